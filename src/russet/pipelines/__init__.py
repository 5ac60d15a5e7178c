"""From a prompt to a picture. Start reading in ``engine.py``."""
