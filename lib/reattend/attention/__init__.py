"""Attention shared by the papers: dense reference, block masks, sparse backends, statistics, host.

Import from the module that defines a thing; this package re-exports nothing.
"""
