"""How pipelines are called: sentences, classes, and what is seen of their steps."""

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline, WanPipeline
from support import pipelines

from attar.errors import AttarError
from attar.models.calls import (
    by_class,
    class_names,
    conditioning,
    following,
    known_classes,
    latents_only,
    makes_videos,
)


@pytest.fixture
def dit():
    return pipelines.make("dit")


def test_what_a_pipeline_takes_and_makes(dit):
    assert by_class(dit) and by_class(DiTPipeline) and not makes_videos(dit)
    assert not by_class(WanPipeline) and makes_videos(WanPipeline)
    assert not by_class(StableDiffusionPipeline) and not makes_videos(StableDiffusionPipeline)
    assert conditioning(pipelines.make("flux"), "a dog") == {"prompt": "a dog"}


def test_a_class_is_a_name_or_a_number(dit):
    assert (
        conditioning(dit, "a dog") == {"class_labels": [2]} == {"class_labels": dit.get_label_ids(["a dog"])}
    )
    assert conditioning(dit, " a figure ") == conditioning(dit, "3") == {"class_labels": [3]}
    for unknown in ("a wolf", "4", "-1", ""):
        with pytest.raises(AttarError, match=r"knows no such class.*a dog.*a number from 0 to 3"):
            conditioning(dit, unknown)
    dit.labels = {}
    assert conditioning(dit, "999") == {"class_labels": [999]}
    with pytest.raises(AttarError, match="a number from 0 to 999"):
        conditioning(dit, "1000")  # stands for no class


def test_every_beginning_of_the_names_is_spread_over_the_classes(dit):
    names = class_names({str(k): f"name {k}, other" for k in range(100)})
    assert sorted(names) == sorted(f"name {k}" for k in range(100))
    first = sorted(int(name.split()[1]) for name in names[:10])
    assert max(b - a for a, b in zip([-1, *first], [*first, 100], strict=True)) <= 20
    assert (
        set(known_classes(dit)) == {*pipelines.PROMPTS, "a digit"}
        and known_classes(pipelines.make("wan")) == []
    )


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_steps_of_a_pipeline_that_calls_nobody_back(dit, guidance):
    noise, steps = [], []
    own, decode = dit.scheduler.step, dit.vae.decode
    options = dict(class_labels=[2], num_inference_steps=3, guidance_scale=guidance, output_type="pt")
    with following(dit, lambda *a: steps.append(a), noise.append) as followed:
        image = dit(generator=torch.Generator().manual_seed(5), **options, **followed).images
    assert torch.equal(noise[0], torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    assert [step for step, *_ in steps] == [0, 1, 2] and [int(t) for _, t, _ in steps] == [666, 333, 0]
    last = steps[-1][2]
    assert last.shape == noise[0].shape
    with torch.no_grad():
        decoded = dit.vae.decode(last / dit.vae.config.scaling_factor).sample
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), image)
    with latents_only(dit) as undecoded:
        dit(**{**options, **undecoded})
        assert dit.vae.decode != decode
    assert dit.scheduler.step == own and dit.vae.decode == decode
