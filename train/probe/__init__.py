"""Runs on one rank whose gradients are measured."""
