"""The attention kernel against float64, beside torch's; its place among diffusers' backends."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError
from attar.runtime import attention_backend as backend_file
from attar.runtime import backend_description, use_backend, use_fast_attention
from attar.runtime.attention import attention, has_kernel
from attar.runtime.cpu.library import library

needs_kernel = pytest.mark.skipif(not has_kernel(), reason="no attention kernel for this processor")


def levels():
    """Instruction sets of packed layers beside which there is an attention kernel."""
    found = []
    for name in library().levels if has_kernel() else ():
        with library().use_kernels(name):
            found += [name] if has_kernel() else []
    return found or [None]


@pytest.fixture(scope="module", params=levels(), autouse=True)
def kernels(request):
    with library().use_kernels(request.param) if request.param else contextlib.nullcontext():
        yield


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def torch_attention(query, key, value, scale=None):
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)


def check(query, key, value, scale=None):
    """Each output within the roundings of the weights, of the scores and of itself, whatever their signs."""
    y = attention(query, key, value, scale)
    assert y.shape == query.shape and y.dtype == query.dtype and y.is_contiguous()
    exact = [t.double() for t in (query, key, value)]
    factor = query.shape[-1] ** -0.5 if scale is None else abs(scale)
    largest = factor * torch.einsum("bqhd,bkhd->bqkh", exact[0].abs(), exact[1].abs()).max()
    most = torch_attention(exact[0], exact[1], exact[2].abs(), scale)  # were all values of one sign
    bound = (2**-8 + 2**-21 * largest) * most + 2**-8 * most.clamp(min=1e-30)
    assert ((y.double() - torch_attention(*exact, scale)).abs() <= bound).all()


@needs_kernel
@pytest.mark.parametrize("size", [0.3, 1, 3, 10])
@pytest.mark.parametrize("width", [64, 128])
def test_no_less_exact_than_torch(size, width):
    query, key, value = (
        noise(1, 200, 2, width) * size,
        noise(1, 700, 2, width, seed=1),
        noise(1, 700, 2, width, seed=2),
    )
    exact = torch_attention(query.double(), key.double(), value.double())
    errors = [(f(query, key, value).double() - exact).norm() for f in (attention, torch_attention)]
    assert errors[0] <= 1.005 * errors[1]  # equal where the rounding of the result is all


@needs_kernel
@given(
    seed=st.integers(0, 2**31 - 1),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    queries=st.one_of(st.integers(1, 40), st.integers(200, 240)),
    keys=st.one_of(st.integers(1, 70), st.integers(240, 270), st.integers(500, 600), st.integers(1020, 1320)),
    width=st.one_of(st.sampled_from([32, 64, 72, 80, 96, 128, 256]), st.integers(1, 256)),
    size=st.sampled_from([0.0, 0.1, 1.0, 8.0, 300.0]),
    scale=st.sampled_from([None, 1.0, -0.3, 0.0]),
)
@settings(deadline=None, max_examples=120)
def test_within_the_rounding(seed, batch, heads, queries, keys, width, size, scale):
    query = noise(batch, queries, heads, width, seed=seed) * size
    key, value = (
        noise(batch, keys, heads, width, seed=seed + 1),
        noise(batch, keys, heads, width, seed=seed + 2),
    )
    check(query, key, value, scale)


@needs_kernel
def test_a_long_sequence():
    check(noise(1, 30, 2, 64) * 3, noise(1, 9000, 2, 64, seed=1), noise(1, 9000, 2, 64, seed=2))


@needs_kernel
def test_one_key_is_copied():
    value = noise(2, 1, 3, 40)
    assert torch.equal(
        attention(noise(2, 20, 3, 40), noise(2, 1, 3, 40), value), value.expand(-1, 20, -1, -1)
    )


@needs_kernel
def test_huge_logits_choose_and_equal_ones_average():
    """Products of 2^60 and more: the largest key takes all. Without differences all keys count alike."""
    key, value = noise(1, 300, 1, 64), noise(1, 300, 1, 64, seed=1)
    query = key[:, 17:18] * 2.0**60
    best = torch.einsum("bqhd,bkhd->bk", query.double(), key.double()).argmax()
    assert torch.equal(attention(query, key, value)[0, 0], value[0, best])
    even = attention(query * 0, key, value)
    torch.testing.assert_close(even.float(), value.float().mean(1, keepdim=True), rtol=0.004, atol=1e-4)


@needs_kernel
def test_scores_that_grow_correct_what_was_summed():
    """Each block of keys brings a score that makes all earlier ones vanish."""
    key = torch.linspace(-4, 4, 1400)[None, :, None, None].expand(1, -1, 2, 32).bfloat16()
    check(torch.full((1, 16, 2, 32), 4.0).bfloat16(), key, noise(1, 1400, 2, 32))
    check(torch.full((1, 16, 2, 32), -4.0).bfloat16(), key, noise(1, 1400, 2, 32))


@needs_kernel
@pytest.mark.parametrize("keys", [1, 15, 17, 255, 257, 513, 767, 769, 1023, 1024, 1025, 1057, 1281])
@pytest.mark.parametrize("queries", [15, 16, 17, 31, 33, 64, 65])
def test_counts_around_those_of_a_block(queries, keys):
    check(noise(1, queries, 1, 64) * 2, noise(1, keys, 1, 64, seed=1), noise(1, keys, 1, 64, seed=2))


@needs_kernel
@pytest.mark.parametrize("growth", [1e-4, 0.01, 0.3, 20.0, -0.01, -20.0])
@pytest.mark.parametrize("queries", [5, 70])
def test_scores_that_grow_over_many_blocks(growth, queries):
    """By less and by more than what a weight has room for; from key to key, and from strip to strip."""
    for every in (1, 40, 500):
        steps = (torch.arange(2100) // every * every).float()[None, :, None, None]
        key = (steps * growth / 8).expand(1, -1, 2, 64).bfloat16() + noise(1, 2100, 2, 64, seed=1) / 8
        query = noise(1, queries, 2, 64, seed=3) / 8 + 1
        check(query.bfloat16(), key, noise(1, 2100, 2, 64, seed=2))


@needs_kernel
@pytest.mark.parametrize("place", [0, 31, 500, 767, 768, 799, 800, 1023, 1024, 1500, 1799])
@pytest.mark.parametrize("size", [1, 8, 100, 2.0**60])
def test_one_key_that_stands_out(place, size):
    key, value = noise(1, 1800, 1, 64), noise(1, 1800, 1, 64, seed=1)
    key[:, place] *= 4
    query = key[:, place : place + 1].expand(-1, 40, -1, -1) * size
    check(query, key, value)
    if size > 1:
        assert torch.equal(attention(query, key, value), value[:, place : place + 1].expand(-1, 40, -1, -1))


@needs_kernel
def test_equal_scores_of_many_keys_average():
    value = noise(1, 2000, 1, 64)
    for query, key in ((0.0, 1.0), (1.0, 1.0), (1.0, -1.0), (1.3 * 2.0**40, 2.0**20), (-1.3 * 2.0**40, 1.7)):
        y = attention(
            torch.full((1, 40, 1, 64), query).bfloat16(), torch.full((1, 2000, 1, 64), key).bfloat16(), value
        )
        torch.testing.assert_close(
            y.float(), value.float().mean(1, keepdim=True).expand(-1, 40, -1, -1), rtol=0.004, atol=1e-5
        )


@needs_kernel
@pytest.mark.parametrize("size", [0.3, 1, 3, 10])
@pytest.mark.parametrize("width", [64, 128])
def test_about_as_exact_as_torch_over_many_keys(size, width):
    """Weights that have shrunk for a larger score of their own block were rounded twice."""
    query = noise(1, 200, 2, width) * size
    key, value = noise(1, 3000, 2, width, seed=1), noise(1, 3000, 2, width, seed=2)
    exact = torch_attention(query.double(), key.double(), value.double())
    errors = [(f(query, key, value).double() - exact).norm() for f in (attention, torch_attention)]
    assert errors[0] <= 1.025 * errors[1]


@needs_kernel
@pytest.mark.parametrize("keys", [50, 1300])
def test_nan_stays_in_its_row_and_in_its_feature(keys):
    query, key, value = noise(1, 30, 1, 32), noise(1, keys, 1, 32, seed=1), noise(1, keys, 1, 32, seed=2)
    query[0, 7, 0, 3] = float("nan")
    value[0, 9, 0, 5] = float("nan")
    y = attention(query, key, value)[0, :, 0]
    assert y[7].isnan().all() and y[:, 5].isnan().all()
    kept = y[[i for i in range(30) if i != 7]][:, [i for i in range(32) if i != 5]]
    assert kept.isfinite().all()


@needs_kernel
def test_views():
    """Heads before tokens, parts of a joint projection, every second feature, a batch that is one and the same."""
    base = noise(2, 3, 50, 128)
    heads_first = base.transpose(1, 2)
    joint = noise(2, 50, 3 * 3 * 32).chunk(3, dim=-1)
    parts = [t.unflatten(-1, (3, 32)) for t in joint]
    cases = [
        [heads_first] * 3,
        parts,
        [heads_first[..., ::2]] * 3,
        [parts[0], *(t[:1].expand(2, -1, -1, -1) for t in parts[1:])],
    ]
    for case in cases:
        assert torch.equal(
            attention(*case), attention(*(t.clone(memory_format=torch.contiguous_format) for t in case))
        )


@needs_kernel
def test_threads_and_groups_of_heads_change_nothing():
    query, key, value = (
        noise(2, 460, 12, 128),
        noise(2, 3000, 12, 128, seed=1),
        noise(2, 3000, 12, 128, seed=2),
    )
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(attention(query, key, value))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert torch.equal(
        results[0][1:, :14, 11:], attention(query[1:, :14, 11:], key[1:, :, 11:], value[1:, :, 11:])
    )


def test_what_the_kernel_does_not_take_is_torchs():
    small = [noise(1, 6, 2, 16, seed=i) for i in range(3)]
    for change in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.double):
        case = [change(t) for t in small]
        assert torch.equal(attention(*case), torch_attention(*case))
    wide = [noise(1, 6, 1, 320, seed=i) for i in range(3)]
    assert torch.equal(attention(*wide), torch_attention(*wide))
    with use_backend("reference"):
        assert torch.equal(attention(*small), torch_attention(*small))
    with library().use_kernels("scalar"):
        assert not has_kernel() and "attention torch's" in backend_description()
        assert torch.equal(attention(*small), torch_attention(*small))
    assert attention(*(t[:0] for t in small)).shape == (0, 6, 2, 16)
    small[0].requires_grad_(True)
    attention(*small).sum().backward()
    assert small[0].grad is not None
    with pytest.raises(AttarError, match="no attention of"):
        attention(small[0], small[1][..., :8], small[2])


def test_the_operator_obeys_the_rules_of_torch():
    case = [noise(2, 9, 2, 32), noise(2, 5, 2, 32, seed=1), noise(2, 5, 2, 32, seed=2)]
    torch.library.opcheck(torch.ops.attar.attention.default, (*case, 0.2))
    torch.library.opcheck(torch.ops.attar.attention.default, (*(t.float() for t in case), 0.2))


def wan_block():
    torch.manual_seed(0)
    block = (
        WanTransformerBlock(64, 96, 2, "rms_norm_across_heads", True).eval().requires_grad_(False).bfloat16()
    )
    rotary = torch.randn(1, 12, 1, 32), torch.randn(1, 12, 1, 32)
    return block, (noise(1, 12, 64), noise(1, 5, 64, seed=1), torch.randn(1, 6, 64), rotary)


@pytest.fixture
def calls(monkeypatch):
    """Shapes of the queries that attar's attention was asked for."""
    seen = []

    def spy(query, *rest):
        seen.append(tuple(query.shape))
        return attention(query, *rest)

    monkeypatch.setattr(backend_file, "attention", spy)
    return seen


def test_diffusers_calls_it_and_can_be_told_otherwise(calls):
    block, call = wan_block()
    expected = block(*call)
    assert not calls and use_fast_attention(block) == 2 and use_fast_attention(block) == 0
    torch.testing.assert_close(block(*call), expected, rtol=0.02, atol=0.02)
    assert calls == [(1, 12, 2, 32)] * 2
    copy.deepcopy(block)(*call)
    assert len(calls) == 4
    with attention_backend("_native_math"):  # chosen by the user
        block(*call)
    assert len(calls) == 4
    assert use_fast_attention(block, on=False) == 2 and torch.equal(block(*call), expected)
    block.attn1.processor._attention_backend = backend_file._Names("flex")
    assert use_fast_attention(block) == 1  # not over another choice


def test_masks_gradients_and_other_types_go_on_to_diffusers(calls):
    block, (x, text, time, rotary) = wan_block()
    use_fast_attention(block)
    block.float()(x.float(), text.float(), time, rotary)
    block.bfloat16()(x.clone().requires_grad_(True), text, time, rotary)
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    qkv = noise(1, 12, 2, 32), noise(1, 12, 2, 32), noise(1, 12, 2, 32)
    masked = backend_file._attention(*qkv, attn_mask=mask)
    assert not calls
    torch.testing.assert_close(masked, torch_attention(*qkv), rtol=0.02, atol=0.02)


def test_a_model_takes_it_by_name(calls):
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
        ffn_dim=32, num_layers=1, rope_max_seq_len=8,
    ).eval().bfloat16()  # fmt: skip
    arguments = noise(1, 4, 1, 4, 4), torch.tensor([3]), noise(1, 3, 8)
    try:
        model.set_attention_backend("attar")
        with torch.no_grad():
            model(*arguments)
        assert len(calls) == 2
    finally:
        model.set_attention_backend("native")


def test_a_block_compiles_without_graph_break():
    block, call = wan_block()
    use_fast_attention(block)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*call), block(*call))
