"""The one training loop, and recipes that stand on it."""
