"""Records as JSON documents, tables and pictures."""
