"""Clips say what their sentences say, and the closed-form judges read it back."""

import pytest
import torch

from attar.errors import AttarError
from attar.models.zoo.clips import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    SIZE,
    SPEEDS,
    Scene,
    all_scenes,
    parse_prompt,
    random_clips,
    split_scenes,
)
from attar.models.zoo.judges import (
    DigitReader,
    judge,
    measured_velocity,
    read_colour,
    read_direction,
    read_speed,
)


def scans(count: int) -> torch.Tensor:
    """Strokes that are no digits: closed-form judges must not need any."""
    generator = torch.Generator().manual_seed(3)
    blob = torch.zeros(count, 8, 8)
    blob[:, 1:7, 3:5] = 1
    blob[:, 2, 2:6] = 1
    return (blob - 0.2 * torch.rand(count, 8, 8, generator=generator)).clamp(0, 1)


def test_every_scene_has_its_own_sentence_and_parses_back():
    scenes = all_scenes()
    assert (
        len({scene.prompt for scene in scenes})
        == len(scenes)
        == 10 * len(COLOURS) * len(DIRECTIONS) * len(SPEEDS)
    )
    assert all(parse_prompt(scene.prompt) == scene for scene in scenes[::37])
    assert parse_prompt("a red fox runs through snow") is None


def test_the_split_is_fixed_and_disjoint_and_covers_every_attribute():
    train, held_out = split_scenes()
    assert len(held_out) == 240 and len(train) == 880
    assert not set(train) & set(held_out)
    assert split_scenes() == (train, held_out)
    for name in ("digit", "colour", "direction", "speed"):
        assert {getattr(s, name) for s in train} == {getattr(s, name) for s in held_out}


def test_motion_and_colour_are_read_back_from_every_combination():
    scenes = [s for s in all_scenes() if s.digit == 0]
    table = torch.tensor([[s.colour, s.direction, s.speed] for s in scenes])
    clips = random_clips(scans(len(scenes)), *table.T, generator=torch.Generator().manual_seed(0))
    assert clips.shape == (len(scenes), 3, FRAMES, SIZE, SIZE)
    assert clips.min() >= 0 and clips.max() <= 1
    video = clips.transpose(1, 2)
    motion = measured_velocity(video)
    assert torch.equal(read_colour(video), table[:, 0])
    assert torch.equal(read_direction(motion), table[:, 1])
    assert torch.equal(read_speed(motion), table[:, 2])


def test_the_whole_path_stays_on_the_canvas():
    count = 64
    zeros = torch.zeros(count, dtype=torch.long)
    for direction in range(8):
        clips = random_clips(
            torch.ones(count, 8, 8),
            zeros,
            zeros + direction,
            zeros + 1,
            torch.Generator().manual_seed(direction),
        )
        ink = (clips[:, 0] > 0.5).float().sum(dim=(2, 3))  # (B, F)
        assert (ink.amin(1) > 0.85 * ink.amax(1)).all()  # nothing leaves the frame


def test_a_still_or_empty_clip_is_not_judged_right_by_accident():
    reader = DigitReader().eval()
    scenes = [Scene(3, 0, d, 1) for d in range(8)]
    still = random_clips(scans(1), *torch.zeros(3, 1, dtype=torch.long), torch.Generator().manual_seed(0))
    still = still[:, :, :1].expand(8, -1, FRAMES, -1, -1).transpose(1, 2)
    assert not any(v.speed for v in judge(still, scenes, reader))
    assert sum(v.direction for v in judge(still, scenes, reader)) <= 1


def test_judging_needs_one_scene_for_each_clip():
    with pytest.raises(AttarError, match="2 clips but 1 scenes"):
        judge(torch.zeros(2, 3, 3, 32, 32), [Scene(0, 0, 0, 0)], DigitReader().eval())


def test_a_folder_without_a_judge_says_so(tmp_path):
    with pytest.raises(AttarError, match="digit reader is missing"):
        DigitReader.load(tmp_path)
