"""What an ONNX file says: one canonical form on loading; shapes, sizes and costs of all in it."""
