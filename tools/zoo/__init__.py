"""Small modules of every family, and the forms in which exporters write them."""
