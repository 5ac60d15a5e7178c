"""Text: CLIP's tokenizer."""
