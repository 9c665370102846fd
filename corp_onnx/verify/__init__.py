"""Whether a smaller model is what was promised, on samples that nothing was fitted to."""
