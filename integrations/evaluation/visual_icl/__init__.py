"""Evaluation of visual in-context learning."""
