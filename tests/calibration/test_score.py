"""Scores of the candidate pool on a traced pipeline."""

import pytest
import torch
from support import pipelines, tiny

from attar.calibration.score import FEATURES, as_tokens, score_candidates
from attar.calibration.select import (
    amplification_metric,
    change_metric,
    min_max,
    patchify,
    rank,
    rank_correlation,
)
from attar.calibration.store import PromptRecord, TraceStore
from attar.calibration.trace import trace_pipeline
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter


def traced(name, folder, prompts=2):
    case, pipe = pipelines.CASES[name], pipelines.make(name)
    store = TraceStore(folder)
    trace_pipeline(
        pipe, pipelines.PROMPTS[:prompts], store, steps=case.steps, seed=5, generation=case.generation
    )
    return pipe, store


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return traced("wan", tmp_path_factory.mktemp("trace"))


@pytest.mark.parametrize("features", FEATURES)
def test_the_table_is_what_the_paper_defines(wan, features):
    pipe, store = wan
    adapter = ModelAdapter.of(pipe.transformer)
    seen = []
    table = score_candidates(
        store, [0, 1], "transformer", adapter, features=features, progress=lambda *a: seen.append(a)
    )
    assert list(zip(table.prompt, table.step, strict=True)) == [(p, k) for p in (0, 1) for k in range(3)]
    assert seen == [(i + 1, 6) for i in range(6)]
    inputs = {}
    for i, (p, k) in enumerate(zip(table.prompt, table.step, strict=True)):
        x = store.latents(p)[0]
        assert table.change[i] == pytest.approx(change_metric(x[k], x[k + 1]).item(), rel=1e-6)
        call = store.calls("transformer", p, k)[0]
        caught = {}
        blocks = pipe.transformer.blocks
        handles = [
            blocks[0].register_forward_pre_hook(
                lambda m, a, kw, c=caught: c.update(block0_input=a[0]), with_kwargs=True
            ),
            blocks[-1].register_forward_hook(lambda m, a, out, c=caught: c.update(last_hidden=out)),
        ]
        with torch.no_grad():
            output = pipe.transformer(**call)[0]
        for handle in handles:
            handle.remove()
        inputs = {
            "latent": patchify(call["hidden_states"], (1, 2, 2))[0],
            "model_output": patchify(output, (1, 2, 2))[0],
            **{k: v[0] for k, v in caught.items()},
        }
        tokens = inputs[features].double()
        expected = torch.linalg.matrix_norm(tokens.T @ tokens, 2).item()
        assert table.amplification[i] == pytest.approx(expected, rel=1e-4)
    expected = min_max(torch.tensor(table.change)) * min_max(torch.tensor(table.amplification))
    assert table.score == pytest.approx(expected.tolist())
    assert not pipe.transformer.training and not pipe.transformer.blocks[-1]._forward_hooks


def test_the_frobenius_norm(wan):
    pipe, store = wan
    table = score_candidates(store, [1], "transformer", ModelAdapter.of(pipe.transformer), norm="frobenius")
    tokens = patchify(store.calls("transformer", 1, 0)[0]["hidden_states"], (1, 2, 2))[0]
    assert table.amplification[0] == pytest.approx(amplification_metric(tokens, "frobenius").item())
    assert table.prompt == [1, 1, 1]


def test_the_neighbour_before_the_step(wan):
    pipe, store = wan
    adapter = ModelAdapter.of(pipe.transformer)
    table = score_candidates(store, [0, 1], "transformer", adapter, neighbour="previous")
    for change, p, k in zip(table.change, table.prompt, table.step, strict=True):
        x = store.latents(p)[0]
        expected = change_metric(x[k], x[k - 1]).item() if k else 0
        assert change == pytest.approx(expected, rel=1e-6)


def test_both_norms_are_compared(wan):
    pipe, store = wan
    adapter = ModelAdapter.of(pipe.transformer)
    tables = [
        score_candidates(store, [0, 1], "transformer", adapter, norm=n) for n in ("spectral", "frobenius")
    ]
    expected = rank_correlation(*(torch.tensor(table.amplification) for table in tables))
    assert [table.norm_correlation for table in tables] == [expected, expected]
    ranked = score_candidates(store, [0, 1], "transformer", adapter, normalise="rank")
    expected = rank(torch.tensor(ranked.change)) * rank(torch.tensor(ranked.amplification))
    assert ranked.score == expected.tolist()


@pytest.mark.parametrize("name", ["cogvideox", "hunyuan", "ltx", "flux", "pixart", "dit"])
@pytest.mark.parametrize("features", FEATURES)
def test_other_families(name, features, tmp_path):
    pipe, store = traced(name, tmp_path, prompts=1)
    table = score_candidates(store, [0], "transformer", ModelAdapter.of(pipe.transformer), features=features)
    assert len(table) == 3 and all(a > 0 for a in table.amplification) and all(c > 0 for c in table.change)


def test_latents_as_tokens():
    video = torch.arange(2 * 4 * 3 * 4 * 6.0).reshape(2, 4, 3, 4, 6)
    assert as_tokens(tiny.wan(), video).shape == (2, 3 * 2 * 3, 4 * 4)
    frames_first = video.transpose(1, 2).contiguous()
    ours, theirs = as_tokens(tiny.cogvideox(), frames_first), as_tokens(tiny.wan(), video)
    assert torch.equal(ours, theirs)
    # as many frames as channels: only the family tells which axis is which
    square = torch.randn(1, 4, 4, 4, 6)
    assert torch.equal(as_tokens(tiny.cogvideox(), square), as_tokens(tiny.wan(), square.transpose(1, 2)))
    assert as_tokens(tiny.pixart(), torch.zeros(1, 4, 8, 8)).shape == (1, 16, 16)
    assert as_tokens(tiny.flux(), torch.zeros(1, 12, 8)).shape == (1, 12, 8)
    assert as_tokens(tiny.wan(), video.bfloat16()).dtype == torch.float32
    with pytest.raises(AttarError, match="neither image, video nor tokens"):
        as_tokens(tiny.wan(), torch.zeros(4, 4))
    with pytest.raises(AttarError, match="no multiple of the patch"):
        as_tokens(tiny.wan(), torch.zeros(1, 4, 3, 5, 6))


def test_two_experts_have_pools_of_their_own(tmp_path):
    pipe, store = traced("wan22", tmp_path)
    tables = {
        name: score_candidates(store, [0, 1], name, ModelAdapter.of(getattr(pipe, name)))
        for name in ("transformer", "transformer_2")
    }
    steps = {name: set(table.step) for name, table in tables.items()}
    assert steps["transformer"] | steps["transformer_2"] == set(range(6))
    assert max(steps["transformer"]) < min(steps["transformer_2"])
    with pytest.raises(AttarError, match=r"did not run in any traced step \[transformer_3\]"):
        score_candidates(store, [0, 1], "transformer_3", ModelAdapter.of(pipe.transformer))


@pytest.mark.parametrize("features", ["latent", "block0_input"])
def test_candidates_that_are_not_finite(tmp_path, features):
    model = tiny.wan()
    store, record = TraceStore(tmp_path), PromptRecord({})
    x = torch.randn(1, 4, 3, 4, 6)
    record.add_latents(x)
    for step in range(2):
        call = {**tiny.wan_call(model), "hidden_states": x if step == 0 else x * torch.nan}
        record.add_call("transformer", call)
        record.end_step(500.0 - step, x + step + 1)
    record.end(x)
    store.save_prompt(0, record)
    with pytest.raises(
        AttarError, match=r"amplification metric of a candidate is not finite \[prompt 0, step 1\]"
    ):
        score_candidates(store, [0], "transformer", ModelAdapter.of(model), features=features)
