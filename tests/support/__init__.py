"""Helpers of the tests: drawn problems, tiny models."""
