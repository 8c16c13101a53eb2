"""Passes from folder to folder: carried out, opened again, judged."""
