"""attar beside the libraries that people use today, in one run on one machine: `python -m benchmarks.peers`."""
