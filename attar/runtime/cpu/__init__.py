"""Kernels for processors: C++ without any library, compiled on the machine that runs them."""
