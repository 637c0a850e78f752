"""From files to batches: sources, crops, masks, colour, loader."""
