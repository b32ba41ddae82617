"""Models out of packages: real weights, converted or loaded, one module a model."""
