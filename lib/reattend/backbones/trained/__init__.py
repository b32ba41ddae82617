"""Models trained here, each by the `build` of its module."""
