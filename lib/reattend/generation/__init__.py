"""Attention in generative models of pictures; one module per paper."""
