"""Is this machine fit, does it compute rightly, how fast is it."""
