"""Operations of training and inference: each file holds one, with its reference, fast forms, gradient and cost."""
