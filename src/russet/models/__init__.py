"""The networks of Stable Diffusion. They know torch and ``russet.attention``; no file, no prompt, no schedule."""
