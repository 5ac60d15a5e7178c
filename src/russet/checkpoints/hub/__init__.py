"""Checkpoints from the Hugging Face Hub, and its cache."""
