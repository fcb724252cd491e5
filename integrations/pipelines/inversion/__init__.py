"""Inversions of a photo into noise, and the cache of their results."""
