"""Attention in speech recognition and translation; one module per paper."""
