"""Built-in sources of text: every module here is a plugin, found by scanning this folder."""
