"""Evaluation of subject insertion."""
