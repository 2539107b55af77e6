"""How the built-in models are trained: one file for each, and what they share."""
