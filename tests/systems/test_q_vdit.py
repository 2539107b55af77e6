"""Q-VDiT (arXiv 2505.22167): the temporal loss, the trained rank-1 branch with its gate, and the recipe over them."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from support import pipelines, tiny
from torch import nn

import attar
from attar.errors import AttarError
from attar.losses import (
    BlockLoss,
    TemporalTerm,
    frame_similarity,
    mse,
    similarity_divergence,
    temporal_distillation,
)
from attar.models.adapter import ModelAdapter
from attar.models.block import BlockCall
from attar.quantize.formats import fake_quantize_weight
from attar.quantize.frame_gate import FrameGrid, frame_gate, moments_of, start_gates
from attar.quantize.linear import QuantizedLinear, parameter_groups
from attar.quantize.low_rank import LowRankSettings, start_branch
from attar.quantize.plan import LayerPlan
from attar.quantize.polish import ScaledCodes
from attar.quantize.reconstruct import ReconstructionSettings, reconstruct_block
from attar.recipe import load_recipe
from attar.runtime.backend import use_backend
from attar.runtime.checkpoint import check_config, quantization_config_of
from attar.runtime.integrity import verify_folder
from attar.runtime.layers import PackedLinear, packed_layers

OUT, IN = 24, 32
TQE = LowRankSettings(rank=1, start="zero", subtract=False)
CLOSED_FORM = LowRankSettings(rank=1, start="error", metric="output", subtract=False)


def make(bits=3, act_bits=None, sizes=(OUT, IN), seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(sizes[1], sizes[0])
    return linear, QuantizedLinear(linear, bits, act_bits, weight_clip=False, act_clip=False)


# ------------------------------------------------------------------------------------------- the branch


@pytest.mark.parametrize("subtract", [False, True])
def test_a_branch_that_starts_at_zero_changes_no_bit(subtract):
    _, layer = make(act_bits=6)
    x = torch.randn(2, 9, IN)
    with torch.no_grad():
        base = layer(x)
        settings = LowRankSettings(rank=1, start="zero", subtract=subtract)
        assert start_branch(layer, settings, generator=torch.Generator().manual_seed(0)) == []
        assert torch.equal(layer(x), base)
    assert layer.branch_in.abs().max() <= IN**-0.5 and layer.branch_in.std() > 0.4 * IN**-0.5
    packed = layer.bake()
    assert packed.low_rank_in.numel() + packed.low_rank_out.numel() == IN + OUT  # and no gate
    assert torch.equal(packed.low_rank_out, torch.zeros(OUT, 1))


def test_what_is_not_subtracted_leaves_the_quantized_weight_as_it_is():
    linear, layer = make()
    down, up = torch.randn(1, IN), torch.randn(OUT, 1)
    layer.set_branch(down, up, subtract=False)
    quantized = fake_quantize_weight(linear.weight.detach(), 3)
    x = torch.randn(7, IN)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ (quantized + up @ down).T + linear.bias)
        layer.freeze()
        torch.testing.assert_close(layer.bake()(x), layer(x))
        torch.testing.assert_close(layer.bake().dequantized(), quantized)


def test_training_the_branch_alone_reaches_the_closed_form():
    """The error drops by σ₁²(Δ C^{1/2}), the most that rank 1 can do for a frozen layer."""
    linear, layer = make(sizes=(16, 24))
    x = torch.randn(512, 24) * torch.linspace(0.2, 2, 24)
    moment = x.T @ x / len(x)
    delta = linear.weight.detach() - fake_quantize_weight(linear.weight.detach(), 3)
    values, vectors = torch.linalg.eigh(moment)
    best = torch.linalg.svdvals(delta @ (vectors * values.sqrt()) @ vectors.T)[0].square().item()

    def error():
        return mse(run(call), targets).item() * 16

    def run(given):
        return {"x": layer(given.streams["x"])}

    call, targets = BlockCall({"x": x[None]}), {"x": linear(x[None]).detach()}
    before = error()
    start_branch(layer, TQE, generator=torch.Generator().manual_seed(0))
    branch = [p.requires_grad_() for p in parameter_groups([layer])["branch"]]
    settings = ReconstructionSettings(epochs=500, branch_lr=0.02)
    reconstruct_block(run, [call], [targets], {"branch": branch}, settings, lambda p, t, c: mse(p, t))
    assert before - error() == pytest.approx(best, rel=0.01)
    start_branch(layer, CLOSED_FORM, moment)
    assert before - error() == pytest.approx(best, rel=0.01)


def test_a_branch_pays_where_activations_are_anisotropic():
    """A few channels 20 times larger: held-out error clearly lower. Isotropic: about 4/d of it, the closed form."""
    left = {}
    for planted in (0, 3):
        linear, layer = make(sizes=(128, 128))
        size = torch.ones(128)
        size[:planted] = 20
        seen, fresh = torch.randn(2, 1024, 128).mul(size).unbind(0)
        with torch.no_grad():
            before = (layer(fresh) - linear(fresh)).square().sum()
            start_branch(layer, CLOSED_FORM, seen.T @ seen / len(seen))
            left[planted] = ((layer(fresh) - linear(fresh)).square().sum() / before).item()
    assert left[3] < 0.7 < 0.94 < left[0] < 1.01, left


def test_a_sample_alone_gives_what_it_gives_in_a_batch():
    _, layer = make(4, 6)
    layer.set_branch(torch.randn(1, IN), torch.randn(OUT, 1), subtract=False)
    x = torch.randn(3, 9, IN) * torch.tensor([1.0, 100.0, 1e-3])[:, None, None]
    x[2, 4] = 1e-9  # in the released quantizer one such token changes the ranges of all
    packed = layer.bake()
    together = packed(x)
    for i in range(3):
        torch.testing.assert_close(packed(x[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)
    packed.low_rank_in = packed.low_rank_out = (
        None  # without the branch, whose product may sum in another order
    )
    assert torch.equal(packed(x[:1])[0], packed(x)[0])


def test_a_sample_is_the_same_alone_and_in_a_batch_bit_for_bit():
    """With its branch, where all its sums are exact, so that their order is no matter."""
    _, layer = make(4, 6)
    down, up = torch.randint(-3, 4, (1, IN)).float(), torch.randint(-3, 4, (OUT, 1)).float()
    layer.set_branch(down, up, subtract=False)
    x = torch.randint(-9, 10, (3, 9, IN)).float() * torch.tensor([1.0, 64.0, 2.0**-10])[:, None, None]
    packed = layer.bake()
    together = packed(x)
    assert all(torch.equal(packed(x[i : i + 1])[0], together[i]) for i in range(3))


# ---------------------------------------------------------------------------------------------- its gate

FRAMES, TOKENS = 4, 12
GRID = FrameGrid(FRAMES, TOKENS)
GROWING = torch.tensor([0.25, 0.5, 1.0, 2.0])  # a factor for each frame


def gated(gate, act_bits=6, trained=False, seed=0):
    """(the layer with a branch without a gate, the same with one)."""
    pair = []
    for found in (None, gate):
        _, layer = make(4, act_bits, seed=seed)
        layer.set_branch(torch.randn(1, IN), torch.randn(OUT, 1), subtract=False)
        if found is not None:
            layer.set_gate(found, trained)
        pair.append(layer)
    return pair


def per_token(gate):
    return gate.repeat_interleave(TOKENS // FRAMES)[:, None]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_gate_of_ones_changes_no_bit(backend):
    plain, layer = gated(torch.ones(FRAMES))
    x = torch.randn(2, TOKENS, IN)
    with torch.no_grad(), use_backend(backend):
        assert torch.equal(layer(x), plain(x))
        ours, theirs = layer.bake(), plain.bake()
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(ours.to(dtype)(x.to(dtype)), theirs.to(dtype)(x.to(dtype)))
            assert torch.equal(ours(x.to(dtype), gelu="tanh"), theirs(x.to(dtype), gelu="tanh"))


def test_a_gate_acts_frame_by_frame():
    plain, layer = gated(torch.tensor([1.0, 0.0, 2.0, 1.0]))
    x = torch.randn(2, TOKENS, IN)
    with torch.no_grad():
        packed, with_one = layer.bake(), plain.bake()
        plain.branch_out.zero_()
        base, outputs = plain.bake()(x), packed(x).unflatten(1, (FRAMES, -1))
        base, one = (y.unflatten(1, (FRAMES, -1)) for y in (base, with_one(x)))
    assert torch.equal(outputs[:, 1], base[:, 1])  # M = 0 gives the base back
    assert torch.equal(outputs[:, [0, 3]], one[:, [0, 3]]) and not torch.equal(outputs[:, 2], one[:, 2])
    torch.testing.assert_close(outputs[:, 2] - base[:, 2], 2 * (one - base)[:, 2], rtol=1e-5, atol=1e-5)
    parts = (packed.low_rank_in, packed.low_rank_out, packed.frame_gate)
    assert sum(part.numel() for part in parts) == IN + OUT + FRAMES


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_beside_a_branch_of_nothing_no_gate_has_an_effect(backend):
    """β = 0, whatever M is: the base bit for bit, learning and packed."""
    _, base = make(4, 6)
    layer = gated(torch.tensor([-3.0, 0.0, 0.5, 1e4]))[1]
    layer.branch_out.data.zero_()
    x = torch.randn(2, TOKENS, IN)
    with torch.no_grad(), use_backend(backend):
        assert torch.equal(layer(x), base(x))
        assert torch.equal(layer.bake()(x), base.bake()(x))


@pytest.mark.parametrize("act_bits", [None, 6])
def test_learning_frozen_and_packed_layers_agree_on_the_gate(act_bits, monkeypatch):
    _, layer = gated(GROWING, act_bits)
    x = torch.randn(3, TOKENS, IN)
    with torch.no_grad():
        learning = layer(x)
        layer.freeze()
        frozen, packed = layer(x), layer.bake()
        torch.testing.assert_close(learning, frozen, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed(x), frozen, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ScaledCodes(packed)(x), frozen, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("attar.quantize.recompute.PIECE", 2 * IN)  # pieces of rows, which frames go across
    torch.testing.assert_close(layer(x.clone().requires_grad_()), frozen, rtol=1e-5, atol=1e-5)


def test_gradients_pass_the_gate():
    _, layer = gated(GROWING, None)
    packed, x = layer.bake(), torch.randn(2, TOKENS, IN, requires_grad=True)
    packed(x).square().sum().backward()
    again = x.detach().clone().requires_grad_()
    branch = per_token(GROWING) * (again @ packed.low_rank_in.T) @ packed.low_rank_out.T
    (again @ packed.dequantized().T + packed.bias + branch).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad, rtol=1e-4, atol=1e-4)
    with pytest.raises(AttarError, match="gate over frames, so its weight cannot be fused"):
        packed.weight.data.clone()


def test_compiled_without_a_graph_break():
    _, layer = gated(GROWING)
    packed, x = layer.bake(), torch.randn(2, TOKENS, IN)
    compiled = torch.compile(packed, fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), packed(x))
        longer = torch.cat([x, x], 1)
        assert torch.equal(compiled(longer), packed(longer))


def test_other_frames_are_refused():
    _, layer = gated(GROWING)
    packed = layer.bake()
    for shape in ((2, TOKENS + 1, IN), (TOKENS, IN), (1, 2, TOKENS, IN)):
        for module in (layer, packed):
            with pytest.raises(AttarError, match=r"4 frames.*Generate as many frames") as error:
                module(torch.randn(shape))
            assert error.value.where == "frame_gate"


def test_the_gate_of_the_paper():
    """η over ω of each frame, Pearson's correlation with what rounding gives; added up over calls."""
    x = torch.randn(5, TOKENS, IN, dtype=torch.float64) * per_token(GROWING)
    q = x + 0.3 * torch.randn_like(x) + 0.1
    found = frame_gate(moments_of(x[:2], q[:2], FRAMES) + moments_of(x[2:], q[2:], FRAMES))
    by_frame = [t.unflatten(1, (FRAMES, -1)).transpose(0, 1).flatten(1) for t in (x, q)]
    rho = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*by_frame, strict=True)])
    sizes = by_frame[0].abs().sum(1)
    torch.testing.assert_close(found, (1 - rho).softmax(0) / (sizes / sizes.sum()))
    same = x[:, :3].repeat(1, FRAMES, 1)
    torch.testing.assert_close(frame_gate(moments_of(same, same.round(), FRAMES)), torch.ones_like(found))


def planted_error(gate, trained, x):
    """The error that is left of a planted one, σ_f (x a) bᵀ with σ growing frame by frame, once the branch has learned
    it; and the gate."""
    _, layer = make(4, None)
    a, b = torch.randn(IN, 1, generator=torch.Generator().manual_seed(5)), torch.ones(1, OUT)
    with torch.no_grad():
        target = layer(x) + per_token(GROWING) * (x @ a) @ b
    start_branch(layer, TQE, generator=torch.Generator().manual_seed(0))
    if gate is not None:
        layer.set_gate(gate, trained)

    def run(call):
        return {"x": layer(call.streams["x"])}

    branch = [p.requires_grad_() for p in layer.branch_parameters()]
    call, before = BlockCall({"x": x}), mse({"x": layer(x)}, {"x": target}).item()
    settings = ReconstructionSettings(epochs=1500, branch_lr=0.02)
    reconstruct_block(run, [call], [{"x": target}], {"branch": branch}, settings, lambda p, t, c: mse(p, t))
    return mse(run(call), {"x": target}).item() / before, layer.frame_gate


@pytest.mark.slow
def test_a_trained_gate_reproduces_an_error_that_grows_frame_by_frame():
    torch.manual_seed(0)
    x = torch.randn(4, TOKENS, IN)
    left, gate = planted_error(torch.ones(FRAMES), True, x)
    assert left < 2e-3 < 0.05 < planted_error(None, False, x)[0]
    torch.testing.assert_close(gate / gate[2], GROWING, rtol=0.05, atol=0)


@pytest.mark.slow
def test_the_estimate_of_the_paper_beats_none_where_smaller_frames_lose_more():
    torch.manual_seed(0)  # whichever tests ran before
    x = torch.randn(4, TOKENS, IN) / per_token(GROWING)
    gate = frame_gate(moments_of(x, x, FRAMES)).float()
    torch.testing.assert_close(gate / gate[2], GROWING, rtol=0.1, atol=0)
    assert planted_error(gate, False, x)[0] < 0.1 * planted_error(None, False, x)[0]


def test_layers_that_read_something_else_have_no_gate():
    text, joint = torch.randn(1, TOKENS, IN), torch.randn(1, TOKENS + 5, IN)
    video = torch.randn(2, TOKENS, IN)
    inputs = {
        "video": video,
        "text": text,
        "joint": joint,
        "context": text,
        "pooled": text[:, 0],
        "idle": None,
    }
    roles = dict.fromkeys(inputs, "self_attn.q") | {"text": "cross_attn.k", "context": "ffn_context.up"}
    plans = {
        n: LayerPlan(f"blocks.0.{n}", role, 4, 6, None, IN, OUT, True, low_rank=1)
        for n, role in roles.items()
    }
    layers = {}
    for name in inputs:
        layers[name] = make(4, 6)[1]
        layers[name].set_branch(torch.randn(1, IN), torch.randn(OUT, 1), subtract=False)

    def run(call):
        for name, given in inputs.items():
            if given is not None:
                layers[name](given)

    gates = start_gates(layers, plans, GRID, run, [None, None], trained=False)
    assert [name for name, gate in gates.items() if gate is not None] == ["video"] and list(gates) == list(
        inputs
    )
    assert [name for name, layer in layers.items() if layer.frame_gate is not None] == ["video"]
    inputs["video"] = video * torch.tensor([1.0, 0, 1, 1]).repeat_interleave(3)[:, None]
    with pytest.raises(AttarError, match=r"the gate over frames is \[.*Set it to none, or skip") as error:
        start_gates(layers, plans, GRID, run, [None], trained=False)
    assert error.value.where == "blocks.0.video"
    with pytest.raises(AttarError, match="12 tokens of 1 frame are no video"):
        FrameGrid(1, TOKENS)


def test_a_scheme_has_a_gate_only_where_the_layer_has_one():
    plain, layer = gated(GROWING)
    model = nn.ModuleDict({"a": plain.bake()})
    assert quantization_config_of(model)["format_version"] == 2
    model["b"] = layer.bake()
    config = quantization_config_of(model)
    assert config["format_version"] == 7 and check_config(config) == config
    assert "frame_gate" not in config["schemes"][0] and config["schemes"][1]["frame_gate"] == FRAMES
    empty = PackedLinear.from_scheme(config["schemes"][1], IN, OUT, True)
    assert empty.frame_gate.is_meta and set(empty.state_dict()) == set(model["b"].state_dict())
    with pytest.raises(AttarError, match="scheme 1 is not one that this attar knows"):
        check_config(config | {"format_version": 6})
    with pytest.raises(AttarError, match="a branch of rank 0 cannot have a gate"):
        PackedLinear(IN, OUT, frame_gate=FRAMES)
    model["b"].frame_gate.data[1] = float("nan")
    with pytest.raises(AttarError, match="gate over frames is not finite"):
        model["b"].settle("b")


# ----------------------------------------------------------------------------------------- the temporal loss


def videos(count=2, frames=4, tokens=6, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, 1, tokens, d, generator=generator)  # frames of one video look alike
    found = [base + torch.randn(2, frames, tokens, d, generator=generator) for _ in range(count)]
    return [video.flatten(1, 2) for video in found]  # (B, t·m, d)


def test_equal_videos_have_no_temporal_loss_and_others_have():
    pred, target = videos()
    assert temporal_distillation(target, target, 4).item() == 0
    assert temporal_distillation(pred, target, 4).item() > 1e-4
    assert temporal_distillation(pred, target, 1).item() == 0  # a single frame


def test_the_gradient_is_the_difference_of_the_distributions():
    pred, target = (frame_similarity(video[:1], 4) for video in videos())
    pred.requires_grad_()
    similarity_divergence(pred, target).backward()
    torch.testing.assert_close(pred.grad, (pred.softmax(-1) - target.softmax(-1)).detach(), rtol=0, atol=1e-6)
    mean_of_two = similarity_divergence(pred.detach().expand(2, -1, -1), target.expand(2, -1, -1))
    torch.testing.assert_close(mean_of_two, similarity_divergence(pred.detach(), target))


def test_what_the_temporal_loss_does_not_see():
    pred, target = videos()
    loss = temporal_distillation(pred, target, 4)

    def changed(video, change):
        return change(video.unflatten(1, (4, 6))).flatten(1, 2)

    order = torch.randperm(6)
    for change in (lambda v: v[:, :, order], lambda v: v.flip(1)):  # tokens of every frame, time
        both = temporal_distillation(changed(pred, change), changed(target, change), 4)
        torch.testing.assert_close(both, loss, rtol=1e-4, atol=0)
    reversed_ = temporal_distillation(changed(pred, lambda v: v.flip(1)), target, 4)
    assert abs(reversed_ - loss) > 0.01 * loss

    def scaled(v, frame):
        return v * torch.ones(4).index_fill(0, torch.tensor([frame]), 3)[:, None, None]

    for frame in range(4):  # a reshape that mixes axes, as in the released code, fails here
        louder = temporal_distillation(changed(pred, lambda v, f=frame: scaled(v, f)), target, 4)
        torch.testing.assert_close(louder, loss, rtol=1e-4, atol=0)


def test_videos_without_frames_are_refused():
    pred, target = ({"hidden_states": video} for video in videos())
    term = TemporalTerm(100, "hidden_states", 4, 24)
    value = BlockLoss(temporal=term)(pred, target)
    expected = mse(pred, target) + 100 * temporal_distillation(
        *(v["hidden_states"] for v in (pred, target)), 4
    )
    torch.testing.assert_close(value, expected)
    with pytest.raises(AttarError, match="makes images"):
        TemporalTerm(100, "hidden_states", 1, 24)
    with pytest.raises(AttarError, match="no stream of the block is the 20 tokens"):
        BlockLoss(temporal=TemporalTerm(100, "hidden_states", 4, 20))(pred, target)
    with pytest.raises(AttarError, match="24 tokens are not 5 frames"):
        temporal_distillation(pred["hidden_states"], target["hidden_states"], 5)


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan", "ltx"])
def test_the_main_stream_of_every_block_is_the_video(name):
    make_model, call = tiny.MODELS[name]
    model = make_model()
    given, adapter = call(model), ModelAdapter.of(model)
    adapter.observe(given)
    grid, seen = adapter.token_grid(given), []
    for block in adapter.blocks:
        place = block.outputs.index(adapter.main_stream(block))

        def look(module, args, out, place=place):
            seen.append(out[place] if isinstance(out, tuple) else out)

        block.module.register_forward_hook(look)
    with torch.no_grad():
        model(**given)
    assert grid.frames > 1 and len(seen) == len(adapter.blocks)
    assert {output.shape[1] for output in seen} == {grid.tokens}


def test_the_weight_of_the_temporal_loss_trades_it_against_the_error():
    """A trained branch beside frozen codes, since it learns smoothly. The paper's γ is 100."""
    mismatch, errors = [], []
    for weight in (0, 1, 10, 100, 1000):
        linear, layer = make(2, sizes=(16, 5))
        x = torch.cat(videos(4)) + 0.5
        call, target = BlockCall({"x": x}), {"x": linear(x).detach()}
        start_branch(layer, TQE, generator=torch.Generator().manual_seed(0))
        branch = [p.requires_grad_() for p in parameter_groups([layer])["branch"]]
        reconstruct_block(
            lambda call, layer=layer: {"x": layer(call.streams["x"])}, [call], [target], {"branch": branch},
            ReconstructionSettings(epochs=200, branch_lr=0.02), BlockLoss(temporal=TemporalTerm(weight, "x", 4, 24)),
        )  # fmt: skip
        with torch.no_grad():
            made = layer(x)
        mismatch.append(temporal_distillation(made, target["x"], 4).item())
        errors.append(mse({"x": made}, target).item())
    assert all(a > b for a, b in itertools.pairwise(mismatch)), mismatch
    assert all(a < b for a, b in itertools.pairwise(errors)), errors


# ------------------------------------------------------------------------------------------------ the recipe


@pytest.fixture(scope="module")
def compressed():
    """Transformers of a tiny pipeline under q-vdit, and without one of its parts."""
    few = {"trace.prompts": 2, "select.count": 3, "reconstruct.epochs": 2}
    changes = {
        "whole": {},
        "without TMD": {"reconstruct.temporal_weight": 0},
        "without TQE": {"quantize.low_rank": None, "reconstruct.train_branch": False},
        "gate": {"quantize.low_rank.gate": "calibrated"},
        "trained gate": {"quantize.low_rank.gate": "trained"},
    }
    case, found = pipelines.CASES["wan"], {}
    for name, change in changes.items():
        found[name] = attar.compress(
            pipelines.make("wan"), "q-vdit", overrides={**few, **change}, prompts=pipelines.PROMPTS[:2],
            generation={**case.generation, "num_inference_steps": case.steps},
        ).transformer  # fmt: skip
    return found


def test_each_part_of_the_recipe_changes_the_model(compressed):
    given = tiny.wan_call(compressed["whole"])
    with torch.no_grad():
        outputs = {name: model(**given)[0] for name, model in compressed.items()}
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs.values(), 2))


def test_the_branch_is_trained_and_packed(compressed):
    layers = packed_layers(compressed["whole"]).values()
    with_branch = [layer for layer in layers if layer.low_rank]
    assert with_branch and all(layer.low_rank == 1 for layer in with_branch)
    assert all(layer.low_rank_out.abs().max() > 0 for layer in with_branch)
    assert not any(layer.low_rank for layer in packed_layers(compressed["without TQE"]).values())


@pytest.mark.parametrize("name", ["gate", "trained gate"])
def test_layers_of_the_video_have_a_gate_and_those_of_the_text_none(compressed, name):
    layers = packed_layers(compressed[name])
    frames = ModelAdapter.of(compressed[name]).token_grid(tiny.wan_call(compressed[name])).frames
    gates = {layer: packed.frame_gate for layer, packed in layers.items() if packed.low_rank}
    without = {layer for layer, gate in gates.items() if gate is None}
    assert without and all(layer.endswith(("attn2.to_k", "attn2.to_v")) for layer in without)
    assert all(gate.shape == (frames,) for gate in gates.values() if gate is not None)
    assert any(bool((gate != 1).all()) for gate in gates.values() if gate is not None)
    assert not any(p.frame_gate is not None for p in packed_layers(compressed["whole"]).values())


def test_a_gate_is_saved_and_loaded(compressed, tmp_path):
    model = compressed["gate"]
    model.save_pretrained(tmp_path / "transformer")
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 7
    verify_folder(tmp_path)
    again = type(model).from_pretrained(tmp_path / "transformer")
    given = tiny.wan_call(model)
    with torch.no_grad():
        assert torch.equal(again(**given)[0], model(**given)[0])
    rounded = type(model).from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    found = next(p for p in packed_layers(rounded).values() if p.frame_gate is not None)
    assert found.frame_gate.dtype == torch.bfloat16
    name = next(n for n, p in packed_layers(model).items() if p.frame_gate is not None)
    scheme = config["schemes"][config["layers"][name]]
    scheme["frame_gate"] += 1
    whole = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(whole | {"quantization_config": config}))
    with pytest.raises(AttarError, match="is not of"):
        verify_folder(tmp_path)


@pytest.mark.slow
def test_streamed_and_by_two_processes_the_gate_is_the_same(commands, tmp_path):
    model = pipelines.save(tmp_path / "wan", "wan")
    few = ("trace.prompts=2", "select.count=3", "reconstruct.epochs=1", "quantize.low_rank.gate=calibrated")
    options = ("--recipe", "q-vdit", *(part for setting in few for part in ("--set", setting)))
    found = {}
    for way, processes, more in (
        ("whole", 1, "--no-stream"),
        ("stream", 1, "--stream"),
        ("two", 2, "--no-stream"),
    ):
        command = commands.start("compress", model, "-o", tmp_path / way, more, *options, processes=processes)
        assert command.wait_all() == [0] * processes, [log.read_text() for log in command.logs]
        tensors = load_file(tmp_path / way / "transformer" / "diffusion_pytorch_model.safetensors")
        found[way] = {name: tensor for name, tensor in tensors.items() if name.endswith("frame_gate")}
        told = json.loads((tmp_path / way / "compression.json").read_text())["components"]["transformer"][
            "blocks"
        ]
        assert {
            f"{b['block']}.{n}.frame_gate" for b in told for n, g in b["frame_gates"].items() if g
        } == set(found[way])
        assert any(gate is None for block in told for gate in block["frame_gates"].values())
    for name, gate in found["whole"].items():
        assert torch.equal(found["stream"][name], gate)
        torch.testing.assert_close(found["two"][name], gate, rtol=1e-5, atol=1e-6)


def test_a_recipe_without_a_gate_is_what_it_was():
    plain = load_recipe("q-vdit", {"quantize.low_rank.gate": "none"})
    assert "gate" not in plain.model_dump()["quantize"]["low_rank"]
    assert load_recipe("q-vdit", {"quantize.low_rank.gate": "trained"}).model_dump()["quantize"]["low_rank"][
        "gate"
    ]


def test_models_of_images_have_no_gate():
    given = {"quantize.low_rank.gate": "calibrated", "reconstruct.temporal_weight": 0, "trace.prompts": 1}
    case = pipelines.CASES["flux"]
    with pytest.raises(AttarError, match="are no video"):
        attar.compress(
            pipelines.make("flux"), "q-vdit", overrides={**given, "select.count": 1}, prompts=pipelines.PROMPTS[:1],
            generation={**case.generation, "num_inference_steps": case.steps},
        )  # fmt: skip


def test_settings_that_do_not_go_together():
    for changes, message in (
        ({"quantize.low_rank": None}, "train_branch needs a branch"),
        ({"reconstruct.train_branch": False}, "starts at zero needs reconstruct.train_branch"),
        ({"rounding.method": "gptq"}, "needs rounding.method nearest"),
        ({"quantize.low_rank.start": "weight"}, "must be subtracted"),
        ({"quantize.low_rank.gate": "trained", "quantize.low_rank.subtract": True}, "is not subtracted"),
        ({"quantize.low_rank.gate": "calibrated", "quantize.shift": True}, "bias for each frame"),
        (
            {
                "quantize.low_rank": {"start": "error", "subtract": False, "gate": "trained"},
                "reconstruct.train_branch": False,
            },
            "trained needs reconstruct.train_branch",
        ),
        (
            {
                "quantize.low_rank.gate": "calibrated",
                "reconstruct": None,
                "select": None,
                "quantize.low_rank.start": "error",
                "finetune": {"bias_lr": 1e-3},
            },
            "made block by block",
        ),
    ):
        with pytest.raises(AttarError, match=message):
            load_recipe("q-vdit", changes)


def test_what_a_branch_learns_from():
    """Subtracted, it gets a gradient through the range of W - B A alone: what it adds, the weight loses."""
    norms = {}
    for subtract in (True, False):
        for quantized in (False, True):
            linear, layer = make(3)
            start_branch(layer, LowRankSettings(rank=2, start="error", subtract=subtract))
            layer.weight_quant = quantized
            branch = [p.requires_grad_() for p in layer.branch_parameters()]
            x = torch.randn(64, IN, generator=torch.Generator().manual_seed(1))
            (layer(x) - linear(x)).square().mean().backward()
            norms[subtract, quantized] = sum(float(p.grad.norm()) for p in branch)
    assert norms[True, False] < 1e-5 < 1e-3 < norms[True, True], norms
    assert norms[False, False] > 1e-2, norms
