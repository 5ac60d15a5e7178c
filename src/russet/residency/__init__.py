"""Where weights are, and how a plan is carried out."""
