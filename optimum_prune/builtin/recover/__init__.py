"""Passes that recover what pruning lost."""
