"""Attention between pictures and words in multimodal language models; one module per paper."""
