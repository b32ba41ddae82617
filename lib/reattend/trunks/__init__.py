"""The small models into which a paper puts its mixer, and text encoders that read one or two texts."""
