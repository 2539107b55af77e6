"""Bits for each layer under a budget: how sensitive layers are, an exact choice, and the plan as a file."""
