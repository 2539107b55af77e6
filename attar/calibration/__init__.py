"""Calibration data: prompts, traced trajectories, selection of samples, and the inputs of blocks."""
