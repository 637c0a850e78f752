"""Recipes: dataclasses, reading, checks; and registries of names."""
