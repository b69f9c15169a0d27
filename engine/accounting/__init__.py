"""What a run costs: predicted from formulas, counted while running, measured on the machine."""
