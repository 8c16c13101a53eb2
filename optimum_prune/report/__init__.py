"""What happened: written, read back."""
