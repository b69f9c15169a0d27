"""Operations: reference, CPU and Triton forms, gradient and cost formula of each in one file."""
