"""What a compressed module weighs."""

from __future__ import annotations

from torch import Tensor, nn

from attar.runtime.layers import packed_layers


def packed_size(module: nn.Module) -> dict[str, float]:
    """Bytes of a module's parameters and buffers, by what they are for.

    Keys: `codes`, `scales` (weight scales and activation clips), `transforms`, `biases` of the packed layers;
    `rest`, everything else; `total`; `weights`, the number of quantized weights; `bits_per_weight`, codes,
    scales and transforms spread over those weights (0.0 when there is no packed layer).
    """
    sizes = {"codes": 0, "scales": 0, "transforms": 0, "biases": 0}
    weights = 0
    for layer in packed_layers(module).values():
        weights += layer.in_features * layer.out_features
        sizes["codes"] += layer.codes.nbytes
        sizes["scales"] += layer.weight_scale.nbytes + _nbytes(layer.act_clip) + _nbytes(layer.row_kind)
        sizes["transforms"] += sum(buffer.nbytes for buffer in layer.transforms.buffers())
        sizes["biases"] += _nbytes(layer.bias)
    total = sum(t.nbytes for t in module.parameters()) + sum(t.nbytes for t in module.buffers())
    overhead = sizes["codes"] + sizes["scales"] + sizes["transforms"]
    return {
        **sizes,
        "rest": total - sum(sizes.values()),
        "total": total,
        "weights": weights,
        "bits_per_weight": 8 * overhead / weights if weights else 0.0,
    }


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
