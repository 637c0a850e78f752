"""A backbone file: safetensors that carries its architecture, its input and its recipe."""
