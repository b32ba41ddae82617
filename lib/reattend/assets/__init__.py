"""Real models and data that ship in packages: the catalogue, and how they are fetched."""
