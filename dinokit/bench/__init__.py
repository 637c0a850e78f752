"""How fast steps, the data path, attention and evaluation are here, beside the machine's own rate."""
