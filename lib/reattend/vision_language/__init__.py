"""Attention in vision transformers: probes, windows, pooling; one module per paper."""
