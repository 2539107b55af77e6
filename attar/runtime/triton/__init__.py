"""Kernels for NVIDIA GPUs in Triton. Only `available` is imported without Triton; it says whether the rest can be."""
