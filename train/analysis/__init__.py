"""From the files of finished runs to statistics, tables and plots; nothing here starts a run."""
