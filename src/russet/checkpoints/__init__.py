"""Checkpoints: the only place that opens weight files.

Reading goes ``locate`` (what did the caller mean?) → ``folder`` (which files?) → ``files`` (what is in them?) →
``fill`` (bytes into a model). ``load`` is the one door that the rest of the library uses; ``save`` is the way back.
"""
