"""GELU behind a packed layer, computed by the layer itself.

In the feed-forwards of diffusers one module holds the first linear and its activation, `GELU` with `proj`. That a GELU
follows is a fact of that module, not of the layer: so the module asks for it, and what replaces or wraps `proj` (a
LoRA, a dense layer) is called as ever. An activation that is a module beside its linear stays a step of its own, as in
the single blocks of Flux and HunyuanVideo.
"""

from __future__ import annotations

from diffusers.models.activations import GELU
from torch import Tensor, nn

from attar.runtime.layers import PackedLinear


class PackedGELU(GELU):
    """diffusers' GELU, which lets a packed `proj` compute it: of the output before its rounding, and in one pass.

    With another `proj`, and with gradients, it is diffusers' own two steps, which differ by the rounding between them.
    Hooks of a packed `proj` see the activated output.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if isinstance(self.proj, PackedLinear):
            return self.proj(hidden_states, gelu=self.approximate)
        return super().forward(hidden_states)


def fuse_gelu(model: nn.Module) -> int:
    """Gives every GELU of diffusers with a packed layer the class above; returns how many there were.

    In place. Names, tensors and what is saved stay the same.
    """
    found = [m for m in model.modules() if type(m) is GELU and isinstance(m.proj, PackedLinear)]
    for module in found:
        module.__class__ = PackedGELU
    return len(found)
