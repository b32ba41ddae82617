"""Attention over pairs of texts: cross-encoders, bi-encoders, robust attention; one module per paper."""
