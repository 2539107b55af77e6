"""Activation bits by groups of denoising steps: the group is found by the timestep, and nothing else changes."""

from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from attar.errors import AttarError
from attar.runtime import backend_name, packed_layers, quantization_config_of, use_backend
from attar.runtime.checkpoint import check_config, replace_linears
from attar.runtime.diffusers_integration import mark_compressed, save_transformer
from attar.runtime.layers import PackedLinear
from attar.runtime.step_groups import StepGroups, choose_group, follow_steps, step_groups_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
BITS = {
    "attn1": (8, 4),
    "ffn": (5, 6),
}  # of the layers with such names; the others have floating-point activations
STEPS = StepGroups((500.0,), True)


def wan(group: int | None = None) -> WanTransformer3DModel:
    """Packed, with bits by groups, or with those of one group in all steps."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=64, num_layers=2, patch_size=(1, 2, 2),
    ).eval()  # fmt: skip
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and name.startswith("blocks."):
            scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
            codes = (linear.weight.detach() / scale).round().to(torch.int8)
            acts = next((bits for part, bits in BITS.items() if part in name), None)
            own = acts if acts is None or group is None else (acts[group],)
            layer = PackedLinear.from_codes(
                codes, scale, 4, linear.bias.detach(), None if own is None else max(own),
                act_groups=own if own is not None and len(own) > 1 else None,
            )  # fmt: skip
            model.set_submodule(name, layer)
    if group is None:
        follow_steps(model, STEPS)
    return mark_compressed(model, "test")


def call(timestep, batch=1):
    generator = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(batch, 4, 2, 8, 8, generator=generator),
        timestep=torch.as_tensor(timestep).expand(batch),
        encoder_hidden_states=torch.randn(batch, 6, 16, generator=generator),
        return_dict=False,
    )


@torch.no_grad()
def run(model, timestep):
    return model(**call(timestep))[0]


@pytest.fixture(scope="module")
def grouped():
    return wan()


@pytest.fixture(scope="module")
def saved(grouped, tmp_path_factory):
    return save_transformer(grouped, tmp_path_factory.mktemp("groups") / "transformer")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_each_group_is_a_model_with_its_bits_everywhere(grouped, backend):
    if backend == "cpu" and backend_name("cpu") != "cpu":
        pytest.skip("no compiled kernels here")
    first, second = wan(0), wan(1)
    with use_backend(backend):
        for timestep, same, other in ((900.0, first, second), (100.0, second, first), (700.0, first, second)):
            assert torch.equal(run(grouped, timestep), run(same, timestep))
            assert not torch.equal(run(grouped, timestep), run(other, timestep))


def test_round_trip_is_bit_exact(grouped, saved, tmp_path):
    loaded = WanTransformer3DModel.from_pretrained(saved)
    assert step_groups_of(loaded) == STEPS
    for timestep in (900.0, 100.0):
        assert torch.equal(run(loaded, timestep), run(grouped, timestep))
    loaded.save_pretrained(tmp_path)
    one, two = (json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path))
    assert one["quantization_config"] == two["quantization_config"]
    first, second = load_file(saved / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_format_is_a_new_one_only_where_groups_are(grouped):
    config, plain = quantization_config_of(grouped), quantization_config_of(wan(0))
    assert config["format_version"] == 6 and plain["format_version"] == 1
    assert config["step_groups"] == {"thresholds": [500.0], "descending": True}
    lists = [scheme.get("act_groups") for scheme in config["schemes"]]
    assert sorted(filter(None, lists)) == [[5, 6], [8, 4]] and None in lists
    assert "step_groups" not in plain and not any("act_groups" in scheme for scheme in plain["schemes"])


def test_casts_and_copies_keep_the_groups(grouped):
    cast = copy.deepcopy(grouped).to(torch.bfloat16)
    first = wan(0).to(torch.bfloat16)
    inputs = {k: v.bfloat16() if torch.is_tensor(v) and v.ndim > 1 else v for k, v in call(900.0).items()}
    with torch.no_grad():
        assert torch.equal(cast(**inputs)[0], first(**inputs)[0])


def test_a_group_ends_with_its_call(grouped):
    """What is called apart never computes for the step of a call that is over, whichever way that ended."""
    model = copy.deepcopy(grouped)
    layer = packed_layers(model)["blocks.0.ffn.net.2"]
    run(model, 900.0)
    with pytest.raises(AttarError, match="the step is not known"):
        layer(torch.randn(1, 64))
    with pytest.raises(RuntimeError):
        model(**{**call(900.0), "encoder_hidden_states": torch.randn(1, 6, 17)})
    with pytest.raises(AttarError, match="the step is not known"):
        layer(torch.randn(1, 64))
    choose_group(model, 1)  # for calls apart: the model's own still follow their timesteps
    assert layer(torch.randn(1, 64)).shape == (1, 32)
    assert torch.equal(run(model, 900.0), run(grouped, 900.0))


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_do_not_share_the_group(grouped, compiled):
    """Two calls are in front of the blocks at the same time, in different groups."""
    model = copy.deepcopy(grouped)
    expected = {timestep: run(grouped, timestep) for timestep in (900.0, 100.0)}
    if compiled:
        model.blocks[0].ffn.compile(backend="eager", fullgraph=True)
        for timestep in expected:
            run(model, timestep)
    both = threading.Barrier(2, timeout=60)
    model.condition_embedder.register_forward_pre_hook(lambda *_: [both.wait()].clear())
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(expected, pool.map(lambda timestep: run(model, timestep), expected), strict=True))
    for timestep, result in expected.items():
        assert torch.equal(found[timestep], result)


def gradient(model, x, after=None):
    """Of the model's input at the step 100. after: a timestep that it is called with before the backward."""
    x = x.clone().requires_grad_()
    loss = model(**{**call(100.0), "hidden_states": x})[0].square().sum()
    if after is not None:
        run(model, after)
    loss.backward()
    return x.grad


@pytest.mark.parametrize("own", [False, True])
def test_checkpointing_recomputes_in_the_group_of_the_forward(grouped, own):
    plain, model = copy.deepcopy(grouped).train(), copy.deepcopy(grouped).train()
    function = partial(checkpoint, use_reentrant=True) if own else None
    model.enable_gradient_checkpointing(function)
    x = call(100.0)["hidden_states"]
    for _ in range(2):
        torch.testing.assert_close(gradient(model, x, after=900.0), gradient(plain, x))
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(model, x, after=900.0), gradient(plain, x))
    model.disable_gradient_checkpointing()
    torch.testing.assert_close(gradient(model, x, after=900.0), gradient(plain, x))


def test_checkpointing_by_hand_is_refused(grouped):
    """Whoever recomputes a block without the model's function gets an error, not the bits of another step."""
    model = copy.deepcopy(grouped)
    forward = model.blocks[1].forward
    model.blocks[1].forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    with pytest.raises(AttarError, match="the step is not known"):
        gradient(model, call(100.0)["hidden_states"])


def test_a_first_block_cache_follows(grouped):
    model = copy.deepcopy(grouped)
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=1e-9))
    for timestep in (900.0, 100.0):
        with model.cache_context("cond"):
            assert torch.equal(run(model, timestep), run(grouped, timestep))


def test_compiled_blocks_follow(grouped):
    model = copy.deepcopy(grouped)
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    for timestep in (900.0, 100.0, 800.0):
        assert torch.equal(run(model, timestep), run(grouped, timestep))


@pytest.mark.slow
def test_a_whole_compiled_model_follows(grouped):
    compiled = torch.compile(copy.deepcopy(grouped), backend="eager")
    for timestep in (900.0, 100.0):
        assert torch.equal(run(compiled, timestep), run(grouped, timestep))


def test_positional_timesteps_and_numbers_are_read(grouped):
    given = call(100.0)
    with torch.no_grad():
        found = grouped(given["hidden_states"], given["timestep"], given["encoder_hidden_states"])[0]
    assert torch.equal(found, run(grouped, 100.0))
    assert STEPS.group(900) == 0 and STEPS.group(torch.tensor(100, dtype=torch.int64)) == 1


def test_gradients_pass_in_the_group(grouped):
    given = call(100.0)
    x = given["hidden_states"].requires_grad_()
    grouped(**given)[0].sum().backward()
    assert x.grad is not None and bool(x.grad.any())


def test_calls_that_cannot_be_told_are_refused(grouped):
    given = call(torch.tensor([900.0, 100.0]), batch=2)
    with pytest.raises(AttarError, match="several groups of steps"):
        grouped(**given)
    with pytest.raises(AttarError, match="without a timestep"):
        grouped(**{**given, "timestep": None})
    with pytest.raises(AttarError, match="no timestep"):
        grouped(**{**given, "timestep": torch.tensor([float("nan")])})
    layer = packed_layers(wan())["blocks.0.ffn.net.2"]  # the model was not called yet
    with pytest.raises(AttarError, match="the step is not known"):
        layer(torch.randn(1, 64))
    choose_group(layer, 1)
    assert layer(torch.randn(1, 64)).shape == (1, 32)
    with pytest.raises(AttarError, match="no group 2"):
        choose_group(layer, 2)
    with pytest.raises(AttarError, match="forward has no timestep"):
        follow_steps(nn.Linear(2, 2), STEPS)


def test_a_model_that_does_not_follow_is_not_saved():
    model = wan()
    plain = nn.ModuleDict({"layer": packed_layers(model)["blocks.0.attn1.to_q"]})
    with pytest.raises(AttarError, match="2 groups of steps, and none are known"):
        quantization_config_of(plain)


@pytest.mark.parametrize(
    ("change", "says"),
    {
        "three groups": (lambda c: c["step_groups"].update(thresholds=[600.0, 400.0]), "and 3 are known"),
        "none": (lambda c: c.pop("step_groups"), "and none are known"),
        "rising": (lambda c: c["step_groups"].update(thresholds=[4.0, 6.0]), "are no thresholds"),
        "infinite": (lambda c: c["step_groups"].update(thresholds=[float("inf")]), "are no thresholds"),
        "a huge one": (lambda c: c["step_groups"].update(thresholds=[10**400]), "is too large"),
        "words": (lambda c: c["step_groups"].update(thresholds=["high"]), "are no thresholds"),
        "no direction": (lambda c: c["step_groups"].pop("descending"), "does not describe groups"),
        "a number": (lambda c: c.update(step_groups=3), "does not describe groups"),
        "an older version": (lambda c: c.update(format_version=5), "unknown field 'step_groups'"),
        "one group": (lambda c: c["schemes"][0].update(act_groups=[8]), "for 1 groups"),
        "no bits": (lambda c: c["schemes"][0].update(act_groups=["8", 4]), "activation bits of groups"),
        "sixteen": (lambda c: c["schemes"][0].update(act_groups=[16, 4], act_bits=16), "16"),
        "not the widest": (lambda c: c["schemes"][0].update(act_groups=[4, 3]), "not different bits of at most 8"),
    }.values(),
)  # fmt: skip
def test_what_is_read_is_checked(grouped, change, says):
    config = json.loads(json.dumps(quantization_config_of(grouped)))
    assert config["schemes"][0]["act_groups"] == [8, 4]
    change(config)
    with torch.device("meta"):
        empty = WanTransformer3DModel.from_config(dict(grouped.config))
    with pytest.raises(AttarError, match=says):
        replace_linears(empty, check_config(config))


def test_groups_of_a_trajectory():
    falling = StepGroups.of_trajectory([1000.0, 900.0, 700.0, 400.0, 100.0], 2)
    assert falling == StepGroups((800.0,), True)
    assert [falling.group(t) for t in (999, 801, 800, 799, 0)] == [0, 0, 0, 1, 1]
    rising = StepGroups.of_trajectory([0.0, 0.1, 0.4, 0.8], 4)
    assert not rising.descending and [rising.group(t) for t in (0.0, 0.1, 0.4, 0.8, 1)] == [0, 1, 2, 3, 3]
    thirds = StepGroups.of_trajectory(list(range(20, 0, -1)), 3)
    assert [sum(thirds.group(t) == g for t in range(1, 21)) for g in range(3)] == [6, 7, 7]
    assert StepGroups.from_config(json.loads(json.dumps(thirds.config()))) == thirds
    with pytest.raises(AttarError, match="2 steps cannot be cut into 3"):
        StepGroups.of_trajectory([2.0, 1.0], 3)
    for unclear in ([3.0, 2.0, 2.0, 1.0], [3.0, 1.0, 2.0, 0.0]):
        with pytest.raises(AttarError, match="do not tell groups of steps apart"):
            StepGroups.of_trajectory(unclear, 2)
