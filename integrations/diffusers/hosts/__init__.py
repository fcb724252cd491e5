"""One file per model architecture, and what they share: what the author of a new host copies."""
