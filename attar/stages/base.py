"""What every stage of a recipe is."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Stage(BaseModel):
    """Frozen settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def one_of(value: str, known: Any) -> str:
    if value not in known:
        raise ValueError(f"unknown value {value!r}; use one of {', '.join(known)}")
    return value
