"""Metal: how far the host may run ahead of the device."""
