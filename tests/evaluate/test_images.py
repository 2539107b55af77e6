"""Images instead of videos: PNG files, the command line, and a report without a player."""

import json
import math

import numpy as np
import pytest
from support import pipelines
from support.fixtures import SMALL

from attar.errors import AttarError
from attar.evaluate.image import read_image_metadata, save_image
from attar.evaluate.report import VideoPair, build_report, check_report_folder
from attar.evaluate.report_data import ReportData
from attar.models.zoo.canvas import SIZE


@pytest.fixture(scope="module")
def dit_folder(tmp_path_factory):
    return pipelines.save(tmp_path_factory.mktemp("models") / "dit", "dit", prompts=None)


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def test_an_image_comes_back_with_its_settings(tmp_path):
    from PIL import Image

    path = save_image(noise(), tmp_path / "a" / "x.png", 3, {"prompt": "ein Füchslein\n=;", "seed": 3})
    with Image.open(path) as image:
        found = np.asarray(image)
    assert np.array_equal(found, noise().repeat(3, 0).repeat(3, 1))
    assert read_image_metadata(path) == {"prompt": "ein Füchslein\n=;", "seed": 3}
    assert [p.name for p in path.parent.iterdir()] == ["x.png"]
    assert read_image_metadata(save_image(noise(), tmp_path / "y.png")) == {}


def test_what_cannot_be_written_or_read(tmp_path):
    for wrong in (noise()[None], noise().astype(float), noise()[..., :1]):
        with pytest.raises(AttarError, match="an image is"):
            save_image(wrong, tmp_path / "x.png")
    with pytest.raises(AttarError, match="cannot write an image"):
        save_image(noise(), tmp_path / "x.jpg")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(AttarError, match="not a readable image"):
        read_image_metadata(tmp_path / "text.png")
    with pytest.raises(AttarError, match="no such image"):
        read_image_metadata(tmp_path / "nothing.png")


def test_generate_writes_images(cli, dit_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("generate", dit_folder, "a dog", "1", "--steps", "2", "--seed", "4", "--json")
    assert [row["file"] for row in json.loads(done.out)] == ["out-0.png", "out-1.png"]
    assert read_image_metadata(tmp_path / "out-1.png")["seed"] == 5
    for arguments, message in (
        (("a dog", "-o", "x.mp4"), "not a .png file"),
        (("a dog", "--fps", "8"), "no frame rate"),
        (("a wolf",), "the model knows no such class"),
    ):
        done = cli("generate", dit_folder, *arguments, "--steps", "1")
        assert done.code == 1 and message in done.err and "Traceback" not in done.err


def test_a_class_conditional_model_on_the_command_line(cli, dit_folder, tmp_path):
    """Its classes are what it is calibrated with and compared on, and its card shows how to ask for one."""
    small, report = tmp_path / "small", tmp_path / "report"
    assert cli("compress", dit_folder, "-o", small, *SMALL).code == 0
    evidence = json.loads((small / "compression.json").read_text())
    assert evidence["prompts"] == ["a red fox runs", "a dog"]  # classes 0 and 2: spread over the four
    roles = {row["role"]: row["bits"] for row in evidence["components"]["transformer"]["plan"]}
    assert roles["self_attn.q"] == "W4A6" and roles["modulation"] == "W4A16"
    assert roles["time_conditioning"] == roles["head"] == "kept"
    card = (small / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "export_to_video" not in card
    assert "pipe(pipe.get_label_ids(['a red fox runs']), num_inference_steps=3" in card
    assert cli("compare", dit_folder, small, "-o", report, "-n", "2").code == 0
    assert sorted(p.name for p in (report / "images").iterdir()) == [
        f"00{i}-{name}.png" for i in range(2) for name in ("compressed", "original")
    ]
    found = ReportData.from_json((report / "report.json").read_text())
    assert [pair.reference for pair in found.pairs] == ["images/000-original.png", "images/001-original.png"]
    assert found.generation.frames == 1 and all(10 < pair.psnr < 80 for pair in found.pairs)
    assert len(found.timestep_errors) == 3
    page = (report / "index.html").read_text()
    assert page.count("<img ") == 4 and "<video" not in page and 'id="scrub"' not in page
    check_report_folder(report)


def test_the_dry_run_of_a_class_conditional_model(cli, dit_folder):
    done = cli("compress", dit_folder, "--dry-run", "--json", *SMALL)
    assert done.code == 0 and json.loads(done.out)["seconds"] > 0


def test_a_report_of_images_or_of_videos_but_not_of_both(report_data, tmp_path):
    path = save_image(noise(), tmp_path / "x.png")
    pair = VideoPair("a dog", path.read_bytes(), path, psnr=math.inf)
    assert pair.reference.startswith("data:image/png;base64,")
    videos = report_data.pairs
    report_data.pairs = [pair]
    page = build_report(report_data, tmp_path / "images").read_text()
    assert "Time for an image" in page and "1 image" in page and page.count("data:image/png;base64,") == 2
    report_data.pairs = [videos[0], pair]
    with pytest.raises(AttarError, match="mixed"):
        build_report(report_data, tmp_path / "both")


def test_the_judges_of_pictures_are_asked_for_single_frames():
    import torch

    from attar.models.zoo import zoo_folder
    from attar.models.zoo.judges import DigitReader, verdicts

    reader = DigitReader.load(zoo_folder("digits-video"))
    frame, clip = torch.rand(1, 1, 3, SIZE, SIZE), torch.rand(1, 3, 3, SIZE, SIZE)
    scene = "a red seven drifts to the upper left, fast"
    assert verdicts(frame, ["red seven"], reader)[0].keys() == {"digit", "colour"}
    assert verdicts(frame, ["the digit two written in cyan"], reader)[0].keys() == {"digit", "colour"}
    assert verdicts(clip, [scene], reader)[0].keys() == {"digit", "colour", "direction", "speed"}
    assert verdicts(frame, [scene], reader) is None and verdicts(clip, ["red seven"], reader) is None
