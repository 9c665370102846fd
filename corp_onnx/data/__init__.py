"""Unlabelled inputs: from pictures, arrays or the user's own code to batches that fit a model."""
