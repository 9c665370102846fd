"""A solution carried out on a copy of the graph: new weights, new shapes, the same interface."""
