"""Closed forms: which channels to keep, and how they stand in for the others."""
