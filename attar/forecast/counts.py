"""What one forward of a module computes and moves: floating-point operations and bytes, counted without any data.

The module runs once on the meta device. Two modes watch: a function mode sees every linear and every attention whole,
counts it by its closed form and returns an empty result of the right shape (no L×L map comes to be, not even as a
shape), a dispatch mode sees every other operator. Bytes are those of kernels that run one after the other and keep
nothing between them, as eager PyTorch does: each operator reads its inputs and writes its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from attar.errors import AttarError, reason
from attar.forecast.alike import Alike, blank, signature
from attar.models.adapter import ModelAdapter
from attar.models.tree import map_tensors, tensors_of

FORMATS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64",
}  # fmt: skip
_FREE = {
    "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "empty_permuted", "detach", "alias",
    "lift_fresh", "_unsafe_view", "_reshape_alias",
}  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """Work of one kernel, or of several alike.

    part: "linear", "attention", "transform" (what a recipe adds before a linear) or "rest". name: dotted name of the
    linear, kind of the attention, name of the operator. role: of the linear or attention. block: dotted name of the
    block it is in, or None. format: the arithmetic ("bf16", "int8", …). flops: two for a multiply-add. read, written:
    bytes, of which `weights` are the linear's own.
    """

    part: str
    name: str
    role: str
    block: str | None
    format: str
    flops: float
    read: float
    written: float
    weights: float = 0.0
    rows: int = 0

    @property
    def bytes(self) -> float:
        return self.read + self.written


@dataclass(frozen=True)
class BlockTraffic:
    """Bytes that enter a block with its call, and that leave it: its streams."""

    inputs: int
    outputs: int


@dataclass(frozen=True)
class Counts:
    """All operations of one forward, in order; for transformers also what enters and leaves each block."""

    operations: tuple[Operation, ...]
    blocks: Mapping[str, BlockTraffic] = field(default_factory=dict)

    def where(self, test: Callable[[Operation], bool]) -> Counts:
        return Counts(tuple(o for o in self.operations if test(o)), self.blocks)

    def times(self, count: int) -> Counts:
        """Of `count` forwards one after the other, as the branches of classifier-free guidance."""
        scaled = (
            replace(
                o, flops=o.flops * count, read=o.read * count, written=o.written * count,
                weights=o.weights * count, rows=o.rows * count,
            )
            for o in self.operations
        )  # fmt: skip
        traffic = {k: BlockTraffic(t.inputs * count, t.outputs * count) for k, t in self.blocks.items()}
        return Counts(tuple(scaled), traffic)

    def flops(self, part: str | None = None) -> float:
        return sum(o.flops for o in self.operations if part in (None, o.part))

    def bytes(self, part: str | None = None) -> float:
        return sum(o.bytes for o in self.operations if part in (None, o.part))

    def share(self, part: str) -> float:
        """Of the floating-point operations, 0 to 1."""
        total = self.flops()
        return self.flops(part) / total if total else 0.0

    def by_role(self, part: str) -> dict[str, tuple[float, float]]:
        """{role: (flops, bytes)} of a part, the largest first."""
        sums: dict[str, tuple[float, float]] = {}
        for o in self.operations:
            if o.part == part:
                flops, moved = sums.get(o.role, (0.0, 0.0))
                sums[o.role] = (flops + o.flops, moved + o.bytes)
        return dict(sorted(sums.items(), key=lambda item: -item[1][0]))


def count_transformer(transformer: nn.Module, call: Mapping[str, Any]) -> Counts:
    """Counts of one forward of a diffusers transformer on the meta device, with the roles of its linears.

    Raises AttarError when the model cannot be run with that call.
    """
    adapter = ModelAdapter.of(transformer)
    linears = [linear for block in adapter.blocks for linear in adapter.linears(block)]
    names = {id(x.module.weight): (x.name, x.role) for x in [*linears, *adapter.outside_linears()]}
    scope = _Scope(names)
    alike = Alike(scope.operations)
    with ExitStack() as stack:
        for block in adapter.blocks:
            stack.enter_context(scope.watch_block(block.name, block.module))
            roles = [(x.name.removeprefix(block.name), x.role) for x in adapter.linears(block)]
            for attention in adapter.attentions(block):
                stack.enter_context(scope.watch_attention(attention.kind, attention.module))
                roles.append((attention.name.removeprefix(block.name), attention.kind))
            stack.enter_context(alike.watch(block.name, block.module, tuple(roles)))
        return _count(lambda: transformer(**call), scope, type(transformer).__name__)


def count_module(module: nn.Module, run: Callable[[], Any]) -> Counts:
    """Counts of whatever `run` does with a module on the meta device (a decoder, a text encoder); roles are plain.

    Raises AttarError when it cannot be run.
    """
    return _count(run, _Scope({}), type(module).__name__)


def _count(run: Callable[[], Any], scope: _Scope, where: str) -> Counts:
    try:
        with torch.no_grad(), _Operators(scope), _Closed(scope):
            run()
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError) as error:
        raise AttarError(f"the model cannot be counted ({reason(error)})", where=where) from error
    return Counts(tuple(scope.operations), scope.traffic)


class _Scope:
    """Where in the model the run is, and what was counted so far."""

    def __init__(self, names: dict[int, tuple[str, str]]) -> None:
        self.names = names
        self.operations: list[Operation] = []
        self.traffic: dict[str, BlockTraffic] = {}
        self.block: str | None = None
        self.kind: str | None = None

    @contextmanager
    def watch_block(self, name: str, module: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.block = name

        def leave(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self.block = None
            self.traffic[name] = BlockTraffic(_total((args, kwargs)), _total(output))

        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def watch_attention(self, kind: str, module: nn.Module) -> Iterator[None]:
        def enter(module: nn.Module, args: tuple) -> None:
            self.kind = kind

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            self.kind = None

        handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Closed(TorchFunctionMode):
    """Linears and attentions by their closed forms."""

    def __init__(self, scope: _Scope) -> None:
        super().__init__()
        self.scope = scope

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.rms_norm:  # one kernel on devices, many operators on meta
            return self._norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out, width = weight.shape
        if input.shape[-1] != width:
            raise RuntimeError(f"a linear of {width} input channels is given {input.shape[-1]}")
        rows = input.numel() // width
        name, role = self.scope.names.get(id(weight), ("", "linear"))
        result = input.new_empty(*input.shape[:-1], out)
        held = weight.nbytes + (0 if bias is None else bias.nbytes)
        self.scope.operations.append(
            Operation(
                "linear", name, role, self.scope.block, _format(input), 2.0 * rows * width * out,
                _stored(input) + held, result.nbytes, held, rows,
            )
        )  # fmt: skip
        return result

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        # (B, H, Nq, d), (B, Hk, Nk, d), (B, Hk, Nk, dv) -> (B, H, Nq, dv)
        *batch, tokens, width = query.shape
        result = query.new_empty(*batch, tokens, value.shape[-1])
        flops = 2.0 * math.prod(batch) * tokens * key.shape[-2] * (width + value.shape[-1])
        kind = self.scope.kind or "other"
        read = sum(map(_stored, (query, key, value)))
        self.scope.operations.append(
            Operation("attention", kind, kind, self.scope.block, _format(query), flops, read, result.nbytes)
        )
        return result

    def _norm(self, input: Tensor, *rest: Any, **options: Any) -> Tensor:
        result = input.new_empty(input.shape)
        self.scope.operations.append(
            Operation(
                "rest", "rms_norm", "elementwise", self.scope.block, _format(input), 0.0,
                _stored(input), result.nbytes,
            )
        )  # fmt: skip
        return result


class _Operators(TorchDispatchMode):
    """Every other operator: bytes in and out, and the operations of convolutions and matrix products.

    An operator without side effects is asked for the shapes of its outputs once for the same arguments: what PyTorch
    does to tell them takes a millisecond, and models repeat their blocks and their frames.
    """

    def __init__(self, scope: _Scope) -> None:
        super().__init__()
        self.scope = scope
        self.seen: dict[Any, tuple[Any, Operation | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _FREE or _is_view(func):
            return func(*args, **kwargs)
        key = (func, signature(args), signature(kwargs))
        if key in self.seen:
            outline, operation = self.seen[key]
            result = map_tensors(outline, blank)
        else:
            result = func(*args, **kwargs)
            operation = self._operation(func, args, kwargs, result)
            if _is_pure(func) and operation is not None and all(t.is_meta for t in tensors_of(result)):
                self.seen[key] = result, operation
        if operation is not None:
            self.scope.operations.append(replace(operation, block=self.scope.block))
        return result

    def _operation(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> Operation | None:
        known = flop_registry.get(func.overloadpacket)
        flops = float(known(*args, **kwargs, out_val=result)) if known else 0.0
        tensors = tensors_of(result)
        if not tensors:
            return None
        role = "matmul" if flops else "elementwise"
        return Operation(
            "rest", func.overloadpacket.__name__, role, None, _format(tensors[0]), flops,
            _total((args, kwargs)), sum(map(_stored, tensors)),
        )  # fmt: skip


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_pure(func: Any) -> bool:
    """Whether an operator writes and returns nothing that it was given."""
    schema = func._schema
    return not schema.is_mutable and all(r.alias_info is None for r in schema.returns)


def _format(tensor: Tensor) -> str:
    return FORMATS.get(tensor.dtype, "fp32")


def _stored(tensor: Tensor) -> int:
    """Bytes without the repetitions of an expanded tensor."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0)
    return math.prod(sizes) * tensor.element_size()


def _total(value: Any) -> int:
    return sum(map(_stored, tensors_of(value)))
