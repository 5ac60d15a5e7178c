"""Where weights are, in which form networks compute, and what moves them."""
