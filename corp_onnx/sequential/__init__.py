"""Block by block, each fitted to the dense stream behind those before it as they were cut."""
