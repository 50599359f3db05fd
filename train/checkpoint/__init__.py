"""Checkpoints: save, find, verify, convert and load them, and the run that resumes from them."""
