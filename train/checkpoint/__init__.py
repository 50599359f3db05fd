"""Checkpoints: saved, found, checked, converted and loaded; and the run that resumes from them."""
