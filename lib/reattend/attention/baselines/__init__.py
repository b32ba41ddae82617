"""Sparse-prefill baselines that the long-context papers compare against."""
