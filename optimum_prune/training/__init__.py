"""New weights by gradients."""
