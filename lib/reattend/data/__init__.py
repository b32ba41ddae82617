"""Loaders for the real data and generators for the synthetic tasks."""
