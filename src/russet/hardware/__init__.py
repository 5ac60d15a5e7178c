"""What the machine is, and what is known to be wrong with it."""
