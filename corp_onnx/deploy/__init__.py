"""Engines: a model made ready for one target, by one protocol."""
