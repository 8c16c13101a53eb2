"""What a plugin may add, and who added what."""
