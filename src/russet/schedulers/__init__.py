"""Samplers: what goes from noise to an image, step by step. They know no model."""
