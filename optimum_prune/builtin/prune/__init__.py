"""Built-in pruners: every module here is a plugin, found by scanning this folder."""
