"""Which implementation runs the packed layers."""

from __future__ import annotations


def backend_name() -> str:
    """Name of the backend in use."""
    return "reference"


def backend_description() -> str:
    """One sentence for people: what the backend in use is good for."""
    return (
        "reference: plain PyTorch, the exact integer arithmetic of the compressed model on any device; "
        "it saves memory, and is not fast"
    )
