"""Measured speed and memory of packed blocks beside dense ones, in one run on this machine."""
