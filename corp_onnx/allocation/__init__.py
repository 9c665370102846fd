"""Unequal widths: within a budget, or for a deadline on a target."""
