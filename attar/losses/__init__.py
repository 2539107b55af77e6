"""Losses: plain functions of tensors, and what a block minimises, put together from them."""

from attar.losses.block import BlockLoss, TemporalTerm
from attar.losses.reconstruction import mse, mse_with_layers, relative_error
from attar.losses.relation import direction_distance, memory_divergence, relation_divergence, smoothed
from attar.losses.statistics import statistics_distance
from attar.losses.temporal import frame_similarity, similarity_divergence, temporal_distillation
from attar.losses.token_weighted import (
    joint_token_weights,
    mass_concentration,
    streams_token_weighted_mse,
    token_weighted_mse,
    token_weights,
    weight_percentiles,
)

__all__ = [
    "BlockLoss",
    "TemporalTerm",
    "direction_distance",
    "frame_similarity",
    "joint_token_weights",
    "mass_concentration",
    "memory_divergence",
    "mse",
    "mse_with_layers",
    "relation_divergence",
    "relative_error",
    "similarity_divergence",
    "smoothed",
    "statistics_distance",
    "streams_token_weighted_mse",
    "temporal_distillation",
    "token_weighted_mse",
    "token_weights",
    "weight_percentiles",
]
