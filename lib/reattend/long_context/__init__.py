"""Sparse attention and key-value caching for long contexts: one module per paper."""
