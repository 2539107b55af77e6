"""Losses: plain functions of tensors."""

from attar.losses.reconstruction import mse, relative_error
from attar.losses.token_weighted import (
    joint_token_weights,
    mass_concentration,
    streams_token_weighted_mse,
    token_weighted_mse,
    token_weights,
    weight_percentiles,
)

__all__ = [
    "joint_token_weights",
    "mass_concentration",
    "mse",
    "relative_error",
    "streams_token_weighted_mse",
    "token_weighted_mse",
    "token_weights",
    "weight_percentiles",
]
