"""Where a training step's time and memory go: a table by phase and operator, a trace, and a page on memory."""
