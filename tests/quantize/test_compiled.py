"""The compiled kernels of training against their definition in PyTorch, on every instruction set of this processor."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.layers import act_formats
from torch import nn

from attar.errors import AttarError
from attar.quantize.compiled import compiled_for
from attar.quantize.formats import _FakeQuantizeRange, fake_quantize_tokens, fake_quantize_weight
from attar.quantize.linear import QuantizedLinear
from attar.quantize.transforms import LearnedKronecker, LearnedScale, apply_kronecker, cayley
from attar.runtime import use_backend
from attar.runtime.cpu.library import library

try:
    LEVELS = list(library().levels)
except AttarError as error:
    pytest.skip(f"no kernels: {error.what}", allow_module_level=True)

seeds, levels = st.integers(0, 2**31 - 1), st.sampled_from(LEVELS)
FACTORS = st.sampled_from(
    [(0.98, 0.97), (0.3, 0.9), (1.0, 1.0), (0.0, 0.5), (1.4, 1.1), (-0.4, 0.6), (0.5, -0.3)]
)
KINDS = ("normal", "zero", "positive", "negative", "tied", "outlier", "tiny", "constant")


def rows_of(seed: int, rows: int, k: int, strided: bool) -> torch.Tensor:
    """Rows of every kind: each has one of the properties that a kernel may trip over."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator)
    for i in range(rows):
        kind = KINDS[int(torch.randint(len(KINDS), (), generator=generator))]
        if kind == "zero":
            x[i] = 0
        elif kind in ("positive", "negative"):
            x[i] = x[i].abs() * (1 if kind == "positive" else -1)
        elif kind == "tied":
            x[i] = x[i].round()  # extremes at several places, and halves after the division
        elif kind == "outlier":
            x[i, int(torch.randint(k, (), generator=generator))] = 1e30
        elif kind == "tiny":
            x[i] *= 1e-9
        elif kind == "constant":
            x[i] = x[i, 0]
    return x.T.contiguous().T if strided else x


def reference_gradients(x, clip, bits, upstream, number="int"):
    """Of the definition; in float64 if x is."""
    leaves = [x.detach().clone().requires_grad_(), clip.detach().to(x.dtype).requires_grad_()]
    low, high = leaves[1].unbind(0) if clip.ndim == 1 else leaves[1].unsqueeze(-1).unbind(0)
    y = _FakeQuantizeRange.apply(leaves[0], low, high, bits, number)
    return y.detach(), torch.autograd.grad(y, leaves, upstream.to(x.dtype))


@given(
    seed=seeds, level=levels, bits=st.integers(2, 16), rows=st.integers(1, 9), k=st.integers(1, 70),
    factors=FACTORS, per_row=st.booleans(), strided=st.booleans(), number=act_formats,
)  # fmt: skip
@settings(deadline=None, max_examples=200)
def test_fake_quantization_is_the_definition_bit_for_bit(
    seed, level, bits, rows, k, factors, per_row, strided, number
):
    per_row &= number == "int"  # of weights
    x = rows_of(seed, rows, k, strided)
    clip = torch.tensor(factors)
    clip = (clip[:, None, None] * torch.linspace(1, 0.9, rows)[:, None]) if per_row else clip
    upstream = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed + 1))
    with use_backend("cpu"), library().use_kernels(level):
        leaves = [x.clone().requires_grad_(), clip.clone().requires_grad_()]
        run = fake_quantize_weight if per_row else partial(fake_quantize_tokens, number=number)
        y = run(leaves[0], bits, leaves[1])
        grads = torch.autograd.grad(y, leaves, upstream)
        plain = fake_quantize_tokens(x, bits, number=number)
    oracle_clip = clip[..., 0] if per_row else clip
    expected, expected_grads = reference_gradients(x, oracle_clip, bits, upstream, number)
    assert torch.equal(y, expected)
    assert torch.equal(plain, reference_gradients(x, torch.ones(2), bits, upstream, number)[0])
    # A sum may differ by a rounding of its largest terms.
    size = upstream.abs().sum(-1, keepdim=True) * (1 + x.abs() / x.abs().amax(-1, keepdim=True).clamp(min=1))
    assert ((grads[0] - expected_grads[0]).abs() <= 1e-5 * size * max(1, max(map(abs, factors)))).all()
    scale = upstream.abs().sum(-1) * x.abs().amax(-1)
    error = (grads[1] - expected_grads[1].view_as(grads[1])).abs().reshape(2, -1)
    assert (error <= 1e-5 * (scale if per_row else scale.sum())).all()


@given(
    seed=seeds, level=levels, bits=st.integers(2, 8), rows=st.integers(1, 5), k=st.integers(1, 70),
    number=act_formats,
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_gradients_of_fake_quantization_are_those_of_float64(seed, level, bits, rows, k, number):
    generator = torch.Generator().manual_seed(seed)
    x, upstream = torch.randn(rows, k, generator=generator), torch.randn(rows, k, generator=generator)
    clip = torch.tensor([0.9375, 0.875])  # exact in both types
    wide, expected = reference_gradients(x.double(), clip, bits, upstream, number)
    with use_backend("cpu"), library().use_kernels(level):
        leaves = [x.clone().requires_grad_(), clip.clone().requires_grad_()]
        y = fake_quantize_tokens(leaves[0], bits, leaves[1], number)
        grads = torch.autograd.grad(y, leaves, upstream)
    assume(torch.allclose(y.double(), wide, rtol=1e-4, atol=1e-4))  # no value lies on a boundary of codes
    for grad, other in zip(grads, expected, strict=True):
        assert torch.allclose(grad.double(), other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_a_row_with_nan_is_nan_and_leaves_others_alone():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    clean = fake_quantize_tokens(x, 4, torch.tensor([0.9, 0.9]))
    for place in (0, 17, 39):
        bad = x.clone()
        bad[2, place] = float("nan")
        for level in LEVELS:
            with use_backend("cpu"), library().use_kernels(level):
                y = fake_quantize_tokens(bad, 4, torch.tensor([0.9, 0.9]))
            assert y[2].isnan().all()
            y[2] = clean[2]
            assert torch.equal(y, clean)


@given(
    seed=seeds, level=levels, rows=st.integers(1, 150), left=st.integers(1, 19), right=st.integers(1, 50),
    strided=st.booleans(), wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_kronecker_rotation_and_its_gradients_are_those_of_float64(
    seed, level, rows, left, right, strided, wanted
):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, left * right, generator=generator)
    factors = [torch.randn(n, n, generator=generator) / n**0.5 for n in (left, right)]
    if strided:
        x, factors = x.T.contiguous().T, [f.T.contiguous().T for f in factors]
    upstream = torch.randn(rows, left * right, generator=generator)
    wanted = wanted if any(wanted) else (True, True, True)

    def run(dtype):
        leaves = [
            t.detach().to(dtype, copy=True).requires_grad_(w)
            for t, w in zip((x, *factors), wanted, strict=True)
        ]
        y = apply_kronecker(*leaves)
        return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t.requires_grad], upstream.to(dtype))

    with use_backend("cpu"), library().use_kernels(level):
        found = run(torch.float32)
    for ours, exact in zip(found, run(torch.float64), strict=True):
        assert ours.dtype == torch.float32 and ours.shape == exact.shape
        assert (ours - exact).norm() <= 1e-5 * max(exact.norm(), x.numel() ** 0.5)  # a sum may cancel


@given(seed=seeds, level=levels, count=st.integers(1, 3), n=st.integers(1, 40), size=st.floats(0, 3))
@settings(deadline=None, max_examples=80)
def test_cayley_and_its_gradient_are_those_of_float64(seed, level, count, n, size):
    generator = torch.Generator().manual_seed(seed)
    parameter = torch.randn(count, n, n, generator=generator) * size
    upstream = torch.randn(count, n, n, generator=generator)

    def run(dtype):
        leaf = parameter.to(dtype, copy=True).requires_grad_()
        rotation = cayley(leaf)
        return rotation.detach(), torch.autograd.grad(rotation, leaf, upstream.to(dtype))[0]

    with use_backend("cpu"), library().use_kernels(level):
        found = run(torch.float32)
    assert (found[0] @ found[0].mT - torch.eye(n)).abs().max() < 1e-4
    for ours, exact in zip(found, run(torch.float64), strict=True):
        assert (ours - exact).norm() <= 1e-4 * max(1, exact.norm())


def learned(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of one step of a layer with all its parameters, and its output."""
    torch.manual_seed(seed)
    scale, rotation = LearnedScale(torch.rand(96) + 0.5), LearnedKronecker(96, affine=True)
    layer = QuantizedLinear(nn.Linear(96, 200), 4, 6, [scale, rotation])
    x = torch.randn(2, 150, 96, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    return [p.grad for p in (x, *layer.transform_parameters(), *layer.clip_parameters())], y.detach()


def test_a_layer_learns_the_same_without_kernels():
    with use_backend("cpu"):
        ours, output = learned()
    with use_backend("reference"):
        theirs, expected = learned()
    # Rotations differ in the last bit, so a few values round to the neighbouring code.
    assert (output - expected).norm() < 1e-2 * expected.norm()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() < 2e-2 * b.norm()


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    x, upstream = torch.randn(700, 96), torch.randn(700, 96)
    clip, factors = torch.tensor([0.9, 0.95]), [torch.randn(n, n) for n in (8, 12)]
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.clone().requires_grad_() for t in (x, clip, *factors)]
            with use_backend("cpu"):
                y = fake_quantize_tokens(apply_kronecker(leaves[0], *leaves[2:]), 4, leaves[1])
                results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        # The clipping factors of all rows are summed by torch.
        assert all(
            torch.equal(a, b) for i, (a, b) in enumerate(zip(results[0], other, strict=True)) if i != 2
        )
        assert torch.allclose(results[0][2], other[2], rtol=1e-5)


def test_the_kernels_are_left_out_where_they_cannot_run(monkeypatch):
    x = torch.randn(3, 8)
    with use_backend("cpu"):
        assert compiled_for(x)
        assert not compiled_for(x, x.double())
        assert not compiled_for(x.to("meta"))
        assert not compiled_for(x[:0])
    with use_backend("reference"):
        assert not compiled_for(x)
    assert fake_quantize_tokens(x[:0], 4).shape == (0, 8)
    with use_backend("cpu"), pytest.raises(AttarError, match="does not fit rows of 8"):
        apply_kronecker(x, torch.eye(3), torch.eye(3))

    monkeypatch.setattr("attar.runtime.cpu.library._found", AttarError("no C++ compiler was found"))
    monkeypatch.delenv("ATTAR_BACKEND", raising=False)
    assert not compiled_for(x)
    assert all(torch.isfinite(g).all() for g in learned()[0])
