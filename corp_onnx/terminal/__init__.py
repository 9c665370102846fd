"""The verbs of the command line, their flags, and what is shown on the terminal."""
