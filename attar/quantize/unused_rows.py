"""Training of parameters of which a step uses some rows alone, such as those of one group of denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def keep_unused_rows(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """From now on a step leaves rows (along the first axis) without a gradient, and their moments, as they are.

    Adam would go on moving them by the moments of earlier steps, so that the steps of one group moved what is of
    another. parameters: some of the optimizer's. Their bias correction counts the steps of all rows.
    """
    before: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # (what is kept, its copy, which rows)

    @torch.no_grad()
    def remember(*_: Any) -> None:
        for parameter in parameters:
            if parameter.grad is None:
                continue
            unused = (parameter.grad.flatten(1) == 0).all(1)
            moments = optimizer.state.get(parameter, {}).values()
            rows = [t for t in (parameter, *moments) if torch.is_tensor(t) and t.shape == parameter.shape]
            before.extend((t, t.clone(), unused) for t in rows)

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for tensor, copy, unused in before:
            tensor[unused] = copy[unused]
        before.clear()

    if parameters:
        optimizer.register_step_pre_hook(remember)
        optimizer.register_step_post_hook(restore)
