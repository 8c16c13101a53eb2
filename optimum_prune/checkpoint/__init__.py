"""Model folders: opened, loaded, saved, verified."""
