"""What the notebooks of a family do alike, into tidy frames, and the figures of it."""
