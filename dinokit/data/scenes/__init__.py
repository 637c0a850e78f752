"""The renderer of the built-in scenes."""
