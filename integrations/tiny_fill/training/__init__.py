"""Training of the tiny model."""
