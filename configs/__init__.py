"""The recipes, installed as dinokit.configs: YAML only, never code."""
