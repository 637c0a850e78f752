"""How fast things are here: steps, the data path, attention, evaluation, each beside the machine's own rate."""
