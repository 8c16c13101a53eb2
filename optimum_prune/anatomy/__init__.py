"""Where things live in a model: families, decoders, axes and shapes."""
