"""What the passes put in place of plain modules: kernels and other ways to compute the same."""
