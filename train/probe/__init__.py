"""Runs on one rank whose gradients are looked at."""
