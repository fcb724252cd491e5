"""The method protocol: what the author of a method reads."""
