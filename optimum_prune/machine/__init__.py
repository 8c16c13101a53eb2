"""Memory, files, processes and progress. Nothing here knows a model."""
