"""Built-in families: every module here is a plugin, found by scanning this folder."""
