"""Comparison of methods by many runs."""
