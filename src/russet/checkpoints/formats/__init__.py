"""Weight files of every format: safetensors, and pickles read without running code."""
