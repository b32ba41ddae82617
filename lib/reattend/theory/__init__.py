"""Theory of attention: small models whose training can be followed weight by weight."""
