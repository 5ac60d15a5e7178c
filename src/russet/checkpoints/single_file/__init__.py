"""A whole model, or one network, in one file."""
