"""The networks of Stable Diffusion. They know torch and their own attention; no file, no prompt, no schedule."""
