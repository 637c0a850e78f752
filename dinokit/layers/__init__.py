"""What backbones and heads are made of."""
