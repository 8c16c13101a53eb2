"""How good a model is, whatever runs it."""
