"""The plan: what to do on a machine, decided by a pure function with reasons."""
