"""One file per architecture: its processor, and where its attention is. host.py has the recipe for another."""
