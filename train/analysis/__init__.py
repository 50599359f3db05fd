"""Statistics, tables and plots from the files of finished runs. Nothing here starts a run."""
