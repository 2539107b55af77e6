"""Tracing tiny real Wan pipelines: what is stored is what ran."""

from typing import ClassVar

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDPMScheduler, CogVideoXPipeline
from support import pipelines, tiny
from transformers import T5Config, T5EncoderModel

from attar.calibration.catch import catch_block_calls
from attar.calibration.store import TraceStore
from attar.calibration.trace import trace_pipeline
from attar.errors import AttarError
from attar.models.adapter import ModelAdapter

PROMPTS = ["a red fox runs", "the blue cat sits", "a dog on snow"]
OPTIONS = dict(steps=3, guidance_scale=4.0, seed=7, generation={**tiny.GENERATION, "negative_prompt": "down"})


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    pipe = tiny.wan_pipeline()
    store = TraceStore(tmp_path_factory.mktemp("trace"))
    seen = []
    trace_pipeline(pipe, PROMPTS, store, **OPTIONS, progress=lambda *a: seen.append(a))
    return pipe, store, seen


def files(store):
    return {p.name: p.read_bytes() for p in sorted(store.folder.iterdir())}


def generate(pipe, prompt, index):
    kwargs = {**tiny.GENERATION, "negative_prompt": "down", "guidance_scale": 4.0, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(7 + index)
    return pipe(prompt, generator=generator, output_type="latent", return_dict=False, **kwargs)[0]


def test_the_trace_is_the_generation(traced):
    pipe, store, _ = traced
    assert store.prompts_done() == [0, 1, 2]
    for index, prompt in enumerate(PROMPTS):
        expected = generate(pipe, prompt, index)
        assert torch.equal(store.final_latents(index), expected)
        x, timesteps = store.latents(index)
        assert x.shape == (4, 1, 4, 3, 4, 8) and timesteps.shape == (3,)
        assert torch.equal(x[-1], expected)
        assert timesteps.tolist() == sorted(timesteps.tolist(), reverse=True)
        noise = torch.randn(1, 4, 3, 4, 8, generator=torch.Generator().manual_seed(7 + index))
        assert torch.equal(x[0], noise)


def test_both_guidance_branches_are_stored_and_run_again(traced):
    pipe, store, _ = traced
    sigmas = None
    for step in range(3):
        cond, uncond = store.calls("transformer", 1, step)
        x, timesteps = store.latents(1)
        assert torch.equal(cond["hidden_states"], x[step])
        assert torch.equal(uncond["hidden_states"], x[step])
        assert not torch.equal(cond["encoder_hidden_states"], uncond["encoder_hidden_states"])
        assert cond["timestep"].item() == timesteps[step].item()
        with torch.no_grad():
            a, b = (pipe.transformer(**call)[0] for call in (cond, uncond))
        pipe.scheduler.set_timesteps(3)
        sigmas = pipe.scheduler.sigmas
        velocity = b + 4.0 * (a - b)
        expected = x[step] + (sigmas[step + 1] - sigmas[step]) * velocity
        torch.testing.assert_close(x[step + 1], expected)


def test_text_and_latents_are_stored_once(traced):
    _, store, _ = traced
    from safetensors import safe_open

    with safe_open(store.path(0), "pt") as file:
        # latents 4, text of two branches, 3 timesteps
        assert len(file.keys()) == 4 + 2 + 3


def test_progress_and_nothing_left_behind(traced):
    pipe, _, seen = traced
    assert seen == [(p, s, 3) for p in range(3) for s in (1, 2, 3)]
    assert not pipe.transformer._forward_pre_hooks
    assert "step" not in vars(pipe.scheduler)


def test_resuming_gives_the_same_files(traced, tmp_path):
    _, whole, _ = traced
    store = TraceStore(tmp_path)
    pipe = tiny.wan_pipeline()
    calls = []

    class Killed(Exception):
        pass

    def stop_in_second(prompt, step, steps):
        calls.append((prompt, step))
        if (prompt, step) == (1, 2):
            raise Killed

    with pytest.raises(Killed):
        trace_pipeline(pipe, PROMPTS, store, **OPTIONS, progress=stop_in_second)
    assert store.prompts_done() == [0]
    assert not pipe.transformer._forward_pre_hooks and "step" not in vars(pipe.scheduler)
    calls.clear()
    trace_pipeline(pipe, PROMPTS, store, **OPTIONS, progress=lambda *a: calls.append(a[:2]))
    assert {p for p, _ in calls} == {1, 2}
    assert files(store) == files(whole)


def test_other_settings_are_refused(traced):
    pipe, store, _ = traced
    with pytest.raises(AttarError, match="traced with other settings"):
        trace_pipeline(pipe, PROMPTS, store, **{**OPTIONS, "seed": 8})
    with pytest.raises(AttarError, match="prompt 1 was traced with other settings"):
        trace_pipeline(pipe, [PROMPTS[0], "up", PROMPTS[2]], store, **OPTIONS)


def test_the_progress_bar_is_silent_and_its_settings_come_back(tmp_path, capfd):
    pipe = tiny.wan_pipeline()
    pipe.set_progress_bar_config(desc="mine")
    trace_pipeline(pipe, PROMPTS[:1], TraceStore(tmp_path), **OPTIONS)
    assert "mine" not in capfd.readouterr().err
    assert pipe._progress_bar_config == {"desc": "mine"}


def test_no_guidance_gives_one_branch(tmp_path):
    pipe = tiny.wan_pipeline()
    store = TraceStore(tmp_path)
    trace_pipeline(pipe, PROMPTS[:1], store, steps=2, guidance_scale=1.0, generation=tiny.GENERATION)
    assert [len(store.calls("transformer", 0, t)) for t in range(2)] == [1, 1]


def test_two_stages_call_two_transformers(tmp_path):
    pipe = tiny.wan_pipeline(two_stages=True)
    store = TraceStore(tmp_path)
    trace_pipeline(pipe, PROMPTS[:1], store, **{**OPTIONS, "steps": 6})
    used = [store.components(0, t) for t in range(6)]
    assert used[0] == ["transformer"] and used[-1] == ["transformer_2"]
    first = sum(u == ["transformer"] for u in used)
    _, timesteps = store.latents(0)
    assert first == int((timesteps >= 800).sum()) and 0 < first < 6
    assert used == [["transformer"]] * first + [["transformer_2"]] * (6 - first)
    for step in range(6):
        low = step >= first
        assert len(store.calls("transformer", 0, step)) == (0 if low else 2)
        assert len(store.calls("transformer_2", 0, step)) == (2 if low else 0)


def test_traced_calls_feed_the_catcher(traced):
    pipe, store, _ = traced
    calls = [call for step in (0, 2) for call in store.calls("transformer", 0, step)]
    adapter = ModelAdapter.of(pipe.transformer)
    caught = catch_block_calls(pipe.transformer, adapter, 1, calls)
    assert len(caught) == 4 and caught[0].streams["hidden_states"].shape == (1, 24, 32)
    assert adapter.token_grid(calls[0]).tokens == 24


def test_bfloat16_latents_and_calls_keep_their_types(tmp_path):
    pipe = tiny.wan_pipeline()
    pipe.transformer.to(torch.bfloat16)
    store = TraceStore(tmp_path)
    trace_pipeline(pipe, PROMPTS[:1], store, steps=2, guidance_scale=1.0, generation=tiny.GENERATION)
    (call,) = store.calls("transformer", 0, 0)
    x, _ = store.latents(0)
    assert call["hidden_states"].dtype == torch.bfloat16 and x.dtype == torch.float32


def cogvideox_pipeline():
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(tiny.WORDS) + 3, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    return CogVideoXPipeline(
        tokenizer=tiny.tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**sizes)).eval(),
        vae=vae.eval(),
        transformer=tiny.cogvideox(),
        scheduler=CogVideoXDPMScheduler(),
    )


def test_guidance_in_one_doubled_batch(tmp_path):
    """CogVideoX runs both branches as one call, and its scheduler's step takes other arguments."""
    pipe = cogvideox_pipeline()
    store = TraceStore(tmp_path)
    generation = dict(height=32, width=48, num_frames=9, max_sequence_length=5)
    trace_pipeline(pipe, PROMPTS[:1], store, steps=3, guidance_scale=6.0, seed=1, generation=generation)
    x, timesteps = store.latents(0)
    assert x.shape == (4, 1, 3, 4, 4, 6) and len(timesteps) == 3
    assert torch.equal(x[-1], store.final_latents(0))
    for step in range(3):
        (call,) = store.calls("transformer", 0, step)
        assert torch.equal(call["hidden_states"], torch.cat([x[step]] * 2))
        assert isinstance(call["image_rotary_emb"], tuple)
    adapter = ModelAdapter.of(pipe.transformer)
    (caught,) = catch_block_calls(pipe.transformer, adapter, 2, store.calls("transformer", 0, 1))
    assert caught.streams["hidden_states"].shape == (2, 18, 32)
    assert adapter.token_grid(store.calls("transformer", 0, 1)[0]).tokens == 18


def test_a_class_conditional_pipeline(tmp_path):
    """Both branches run as one call; the latents are those of one image, and nothing is decoded."""
    pipe = pipelines.make("dit")
    pipe.vae.decode = None
    store = TraceStore(tmp_path)
    names = ["a dog", "3"]
    trace_pipeline(pipe, names, store, steps=3, guidance_scale=4.0, seed=2)
    for index, number in enumerate((2, 3)):
        x, timesteps = store.latents(index)
        assert x.shape == (4, 1, 4, 8, 8) and timesteps.tolist() == [666, 333, 0]
        assert torch.equal(x[0], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2 + index)))
        assert torch.equal(x[-1], store.final_latents(index))
        for step in range(3):
            (call,) = store.calls("transformer", index, step)
            assert torch.equal(call["hidden_states"], torch.cat([x[step]] * 2))
            assert call["class_labels"].tolist() == [number, 1000]
    with pytest.raises(AttarError, match="knows no such class"):
        trace_pipeline(pipe, ["a dog", "a wolf"], TraceStore(tmp_path / "other"), steps=3)
    assert not list((tmp_path / "other").glob("*"))


class NoCallback:
    components: ClassVar = {}

    def __call__(self, prompt):
        return prompt


def test_pipelines_that_cannot_be_followed_are_refused(tmp_path):
    pipe = NoCallback()
    with pytest.raises(AttarError, match="no transformer or unet component"):
        trace_pipeline(pipe, PROMPTS, TraceStore(tmp_path), steps=1)
    pipe.components = {"transformer": torch.nn.Identity()}
    with pytest.raises(AttarError, match="callback_on_step_end"):
        trace_pipeline(pipe, PROMPTS, TraceStore(tmp_path), steps=1)
    with pytest.raises(AttarError, match="cannot be stored as JSON"):
        trace_pipeline(
            tiny.wan_pipeline(),
            PROMPTS,
            TraceStore(tmp_path),
            steps=1,
            generation={"latents": torch.zeros(1)},
        )
