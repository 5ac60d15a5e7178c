"""Stable Diffusion on Apple silicon, and on CUDA and the CPU with the same code."""
