"""How an error of the model's outputs reaches the latents of a step, and blocks that stand in for others."""

import pytest
import torch
from support import autoencoders, pipelines
from torch import nn

from attar.budget.influence import Picture, Step, accumulated, standing_in
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline, transformer_components
from attar.errors import AttarError


def traced(case, tmp_path, steps=3):
    """The case's transformer, its traced calls at each step, and the latents before and after them."""
    pipe = pipelines.make(case)
    store = TraceStore(tmp_path / "trace")
    known = pipelines.CASES[case].generation
    options = {k: v for k, v in known.items() if k not in ("num_inference_steps", "guidance_scale")}
    trace_pipeline(
        pipe, [pipelines.PROMPTS[0]], store, steps=steps, guidance_scale=known.get("guidance_scale"), generation=options
    )  # fmt: skip
    x, _ = store.latents(0)
    found = []
    for name, part in transformer_components(pipe).items():
        ran = [k for k in range(store.steps(0)) if name in store.components(0, k)]
        found += [(part, store.calls(name, 0, k), x[k], x[k + 1]) for k in ran]
    return found


@pytest.mark.parametrize("case", sorted(pipelines.CASES))
def test_every_pipelines_step_is_linear_in_what_the_model_gave(case, tmp_path):
    """Also its guidance. Schedulers of second order use outputs of the step before, so only the first step is exact."""
    part, calls, before, after = traced(case, tmp_path)[0]
    step = Step(part, calls, before, after)
    assert all(output.shape == before.shape for output in step.outputs)
    parts = zip(step.coefficients, step.outputs, strict=True)
    left = after.double() - step.kept * before.double() - sum(c * o.double() for c, o in parts)
    assert left.square().sum() / after.double().square().sum() < 1e-6
    assert not step.change(part).any()


class Model(nn.Module):
    """Two blocks side by side, the second of which hardly counts."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.to(dtype)

    def forward(self, hidden_states, return_dict=True):
        assert not return_dict
        return (self.first(hidden_states) + 0.01 * self.second(hidden_states),)


def guided(model, scale=5.0, a=0.9, c=-0.2):
    """A step of a scheduler with guidance: two calls, latents before, latents after."""
    torch.manual_seed(1)
    before = torch.randn(1, 4, 6)
    calls = [{"hidden_states": torch.randn(1, 4, 6).to(model.first.weight.dtype)} for _ in range(2)]
    with torch.no_grad():
        without, with_prompt = (model(**call, return_dict=False)[0].float() for call in calls)
    after = a * before + c * (without + scale * (with_prompt - without))
    return calls, before, after


def test_coefficients_are_those_of_scheduler_and_guidance():
    model = Model()
    step = Step(model, *guided(model, scale=5.0, a=0.9, c=-0.2))
    assert step.kept == pytest.approx(0.9, abs=1e-5)
    assert step.coefficients == pytest.approx([-0.2 * (1 - 5.0), -0.2 * 5.0], abs=1e-5)


def test_the_change_is_that_of_the_latents():
    model = Model()
    calls, before, after = guided(model)
    step = Step(model, calls, before, after)
    with torch.no_grad():
        model.first.weight += 0.01 * torch.randn(6, 6)
    changed = guided(model)[2]
    torch.testing.assert_close(step.change(model).float(), (changed - after).flatten(), rtol=1e-3, atol=1e-5)


def test_what_both_branches_share_is_not_guided():
    """An equal error of both branches moves the latents by c alone, an opposite one by guidance."""
    model = Model()
    step = Step(model, *guided(model, scale=5.0, c=-0.2))
    with torch.no_grad():
        model.first.bias += 0.1
    torch.testing.assert_close(
        step.change(model).float(), torch.full((24,), -0.2 * 0.1), rtol=1e-3, atol=1e-5
    )


def test_a_block_that_hardly_counts_has_little_influence():
    model = Model()
    step = Step(model, *guided(model))
    errors = []
    for name in ("first", "second"):
        other = nn.Linear(6, 6)
        other.load_state_dict(getattr(model, name).state_dict())
        with torch.no_grad():
            other.weight += 0.1 * torch.randn(6, 6, generator=torch.Generator().manual_seed(2))
        with standing_in(getattr(model, name), other):
            errors.append(step.change(model).square().sum().item())
        assert not step.change(model).any()  # the block is itself again
    assert errors[1] == pytest.approx(1e-4 * errors[0], rel=1e-3)


def test_a_block_stands_in_for_one_of_another_type():
    model = Model(torch.bfloat16)
    wide = nn.Linear(6, 6)
    wide.load_state_dict(model.first.state_dict())
    given = torch.randn(1, 4, 6, dtype=torch.bfloat16)
    with torch.no_grad(), standing_in(model.first, wide):
        there = model.first(given)
    assert there.dtype == torch.bfloat16
    assert torch.equal(there, wide(given.float()).bfloat16())


def test_a_variance_beside_the_output_is_left_out():
    class Both(Model):
        def forward(self, hidden_states, return_dict=True):
            (mean,) = super().forward(hidden_states, return_dict)
            return (torch.cat([mean, torch.randn_like(mean)], 1),)

    model = Both()
    calls, before, after = guided(Model())
    step = Step(model, calls, before, after)
    assert step.kept == pytest.approx(0.9, abs=1e-5) and not step.change(model).any()


def test_outputs_that_are_no_latents_are_refused():
    model = Model()
    calls, before, after = guided(model)
    with pytest.raises(AttarError, match="cannot be followed") as refused:
        Step(model, calls, before[:, :3], after[:, :3])
    assert "allocate.objective=block" in (refused.value.fix or "")


def test_equal_changes_add_up_and_unrelated_ones_average_out():
    torch.manual_seed(0)
    same = torch.randn(1, 4000, dtype=torch.float64).expand(8, -1)
    one = same[0].square().sum().item()
    assert accumulated(list(same), steps=50) == pytest.approx(50**2 * one)
    assert accumulated([same[0]], steps=1) == pytest.approx(one)
    other = torch.randn(8, 4000, dtype=torch.float64)
    # what eight samples leave of 28 products, times 50·49/(8·7)
    assert accumulated(list(other), steps=50) == pytest.approx(50 * 4000, rel=0.4)


def test_what_is_known_of_all_steps_is_the_square_of_their_sum():
    torch.manual_seed(0)
    changes = torch.randn(12, 40, dtype=torch.float64) + 0.5
    assert accumulated(list(changes), steps=12) == pytest.approx(changes.sum(0).square().sum().item())


def test_the_change_of_a_picture_is_what_a_stand_in_makes_of_it():
    decoder = autoencoders.trained_decoder()
    latent = autoencoders.latents(1)
    picture, block = Picture(decoder, [{"hidden_states": latent}]), decoder.up_blocks[1][0]
    assert not picture.change(decoder).any()
    with torch.no_grad():
        before = decoder(latent).double()
        with standing_in(block, lambda x: 1.5 * block.forward(x)):
            found, after = picture.change(decoder), decoder(latent).double()
    assert torch.equal(found, (after - before).flatten()) and found.any()
    assert picture.size == pytest.approx(before.square().sum().item())
