"""Checkpoints: the only place that opens weight files.

``load`` is what the rest of the library calls. It goes through ``arguments`` (what did the caller mean?), ``folder``
(which components of which classes?), ``formats.weight_files`` (which files, with which tensors?) and
``load_state_dict`` (the tensors into a model). ``save`` writes what ``load`` reads.
"""
