"""Closed forms: which channels to keep, and how they stand in for the others."""

from corp_onnx.solve.one_shot import solve
from corp_onnx.solve.recipe import DEFAULT_RIDGE, METHODS, Method, Recipe

__all__ = ["DEFAULT_RIDGE", "METHODS", "Method", "Recipe", "solve"]
