"""Seeds of random generators from words."""

from __future__ import annotations

import hashlib


def seed_of(*parts: str) -> int:
    """A seed from words, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(parts).encode()).digest()[:6], "big")
