"""The CPU: Winograd convolutions, oneDNN, and malloc tuning."""
