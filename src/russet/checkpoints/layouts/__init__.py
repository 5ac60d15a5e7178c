"""Names that tensors and configs have in the checkpoints of other programs and older versions."""
