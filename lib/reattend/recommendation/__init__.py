"""Recommendation: one module per paper, each the method alone."""
