"""Puts tests/ on the path, so that every test can say `from support import tiny`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from support.fixtures import cli, commands, small_limit, wan_folder  # noqa: F401 - shared fixtures
