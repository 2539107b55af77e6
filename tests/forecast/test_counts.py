"""Counts against closed forms, against torch's own counter, and against what is known of the real models."""

import pytest
import torch
from support import tiny
from support.shapes import architecture, counted
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from attar.errors import AttarError
from attar.forecast.architecture import shape_names
from attar.forecast.calls import Size, decode, encode, latent_of
from attar.forecast.counts import count_module, count_transformer
from attar.models.tree import map_tensors

CLOSE = 0.03


def on_meta(name, **overrides):
    build, call = tiny.MODELS[name]
    model = build(**overrides)
    given = call(model)
    return model.to("meta"), map_tensors(given, lambda t: t.to("meta"))


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_the_operations_are_those_that_torch_counts(name):
    model, call = on_meta(name)
    with FlopCounterMode(display=False) as known, torch.no_grad():
        model(**call)
    counts = count_transformer(model, call)
    assert counts.flops() == known.get_total_flops()
    assert counts.share("linear") + counts.share("attention") + counts.share("rest") == pytest.approx(1)
    blocks = {o.block for o in counts.operations if o.part == "attention"} - {None}
    assert blocks <= set(counts.blocks) and blocks


@pytest.mark.parametrize("name", sorted(tiny.MODELS))
def test_every_linear_of_a_block_is_counted_under_its_name(name):
    from attar.models.adapter import ModelAdapter

    model, call = on_meta(name)
    adapter = ModelAdapter.of(model)
    counts = count_transformer(model, call)
    # DiT calls the embedding of its first block again for the head: the first call is the block's
    seen = {o.name: o for o in reversed(counts.operations) if o.part == "linear"}
    for block in adapter.blocks:
        for linear in adapter.linears(block):
            operation = seen[linear.name]
            assert (operation.role, operation.block) == (linear.role, block.name)
            assert operation.flops == 2 * operation.rows * linear.module.weight.numel()


def test_bytes_of_single_operators():
    linear = nn.Linear(8, 4, device="meta", dtype=torch.bfloat16)
    x = torch.empty(3, 8, device="meta", dtype=torch.bfloat16)
    (operation,) = count_module(linear, lambda: linear(x)).operations
    assert (operation.read, operation.written, operation.weights) == (2 * (24 + 32 + 4), 24, 72)
    q, k, v = (torch.empty(2, 5, n, 16, device="meta") for n in (7, 11, 11))
    (operation,) = count_module(linear, lambda: F.scaled_dot_product_attention(q, k, v)).operations
    assert operation.flops == 2 * 2 * 5 * 7 * 11 * 16 * 2
    assert operation.bytes == 4 * 2 * 5 * 16 * (7 + 11 + 11 + 7)
    wide = torch.empty(1, 8, device="meta").expand(1000, 8)  # in memory once
    (operation,) = count_module(linear, lambda: wide + wide).operations
    assert (operation.read, operation.written) == (2 * 32, 32_000)
    assert not count_module(linear, lambda: x.view(24).t().detach()).operations  # views move nothing
    twice = count_module(linear, lambda: linear(x)).times(2)
    assert (twice.flops(), twice.bytes()) == (2 * 2 * 3 * 8 * 4, 2 * (120 + 24))


def test_operators_that_come_again_are_counted_again():
    x, seen = torch.empty(4, 6, device="meta"), []

    def run():
        for rows in (2, 3):  # known from data alone
            first, second = x.t() * 2.0, x.t() * 2
            seen.append((first.stride(), second.stride(), first.add_(1) is first))
            part = x[torch.arange(4) < rows]
            seen.append((part + part).shape[0])

    counts = count_module(nn.Identity(), run)
    assert seen == [((1, 6), (1, 6), True), 2, ((1, 6), (1, 6), True), 3]
    moved = [(o.name, o.bytes) for o in counts.operations if o.name in ("mul", "add", "add_")]
    assert moved == [
        row
        for rows in (2, 3)
        for row in (("mul", 192.0), ("mul", 192.0), ("add_", 192.0), ("add", 3 * rows * 24.0))
    ]


def test_a_model_that_cannot_be_run():
    model, call = on_meta("wan")
    with pytest.raises(AttarError, match="cannot be counted"):
        count_transformer(model, {**call, "encoder_hidden_states": torch.empty(1, 5, 7, device="meta")})


# tokens, PFLOP of one forward, share of self or joint attention, parameters in billions: by hand, from the closed
# forms 2N(4d² + 2df) + 4N²d of each layer, and by counting the published weights
KNOWN = {
    ("wan-1.3b", 832, 480, 81): (32760, 0.283, 0.70, 1.42),
    ("wan-14b", 832, 480, 81): (32760, 1.68, 0.52, 14.29),
    ("wan-14b", 1280, 720, 81): (75600, 6.52, 0.72, 14.29),
    ("wan2.2-5b", 1280, 704, 121): (27280, 0.517, 0.53, 5.00),
    ("hunyuan", 1280, 720, 129): (118800, 12.07, 0.87, 12.82),
    ("hunyuan", 960, 544, 61): (32640, 1.25, 0.64, 12.82),
    ("cogvideox-2b", 720, 480, 49): (17550, 0.120, 0.61, 1.69),
    ("cogvideox-5b", 720, 480, 49): (17550, 0.332, 0.49, 5.57),
    ("ltx-2b", 704, 480, 161): (6930, 0.034, 0.32, 1.92),
    ("flux", 1024, 1024, 1): (4096, 0.0744, 0.20, 11.9),
}


@pytest.mark.parametrize("case", KNOWN, ids=lambda c: f"{c[0]}-{c[1]}x{c[2]}x{c[3]}")
def test_real_models(case):
    name, width, height, frames = case
    tokens, pflop, share, billions = KNOWN[case]
    counts = counted(name, f"{width}x{height}", frames)
    assert counts.flops() / 1e15 == pytest.approx(pflop, rel=CLOSE)
    main = sum(counts.by_role("attention").get(kind, (0, 0))[0] for kind in ("self", "joint"))
    assert main / counts.flops() == pytest.approx(share, abs=0.01)
    assert max(o.rows for o in counts.operations if o.role.startswith("ffn")) in (
        tokens, tokens + architecture(name).default["text_tokens"],
    )  # fmt: skip
    (transformer,) = architecture(name).transformers.values()
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_shape_is_known():
    assert {case[0] for case in KNOWN} == set(shape_names())


def test_closed_form_of_wan():
    """Of each layer: self-attention 4N²d, cross-attention 4NTd, linears 2N(6d² + 2df) + 4Td²."""
    counts = counted("wan-1.3b", "832x480", 81)
    n, d, f, t, layers = 32760, 1536, 8960, 512, 30
    inside = counts.where(lambda o: o.block is not None)
    assert inside.by_role("attention")["self"][0] == layers * 4 * n * n * d
    assert inside.by_role("attention")["cross"][0] == layers * 4 * n * t * d
    assert inside.flops("linear") == layers * (2 * n * (6 * d * d + 2 * d * f) + 4 * t * d * d)


@pytest.mark.parametrize(
    ("name", "encoder", "billions"),
    [
        ("wan-1.3b", "text_encoder", 5.68),
        ("cogvideox-2b", "text_encoder", 4.76),
        ("hunyuan", "text_encoder", 7.5),
    ],
)
def test_text_encoders(name, encoder, billions):
    """Two operations for each weight that multiplies and each token, and the attention's few more."""
    part = architecture(name).text_encoders[encoder]
    assert sum(p.numel() for p in part.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)
    tokens, run = encode(part, 226)
    weights = sum(m.weight.numel() for m in part.modules() if isinstance(m, nn.Linear))
    assert 1 <= count_module(part, run).flops() / (2 * weights * tokens) < 1.03


def test_a_text_encoder_takes_what_fits():
    assert encode(architecture("flux").text_encoders["text_encoder"], 512)[0] == 77


@pytest.mark.parametrize(
    ("name", "millions"), [("wan-1.3b", 126.9), ("wan2.2-5b", 704.7), ("hunyuan", 246.5)]
)
def test_decoders(name, millions):
    """The parameters are those of the published weights; convolutions grow with the latent's volume."""
    vae = architecture(name).vae
    assert sum(p.numel() for p in vae.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    flops = []
    for width in (128, 256):
        latent = latent_of(architecture(name), Size(width, 128, 9, 512))
        flops.append(count_module(vae, decode(vae, latent)).by_role("rest")["matmul"][0])
    assert flops[1] == pytest.approx(2 * flops[0], rel=1e-9) and flops[0] > 0
