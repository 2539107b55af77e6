"""The command line: parses, calls, prints. Results go to stdout, everything else to stderr."""

from attar.cli import allocating, compressing, measuring, recipes  # noqa: F401 - their commands register themselves
from attar.cli.app import main

__all__ = ["main"]
