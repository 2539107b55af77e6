import base64

import numpy as np
import pytest
import torch

from attar.errors import AttarError
from attar.evaluate.video import contact_sheet, load_video, read_metadata, save_video, to_data_uri, to_frames


def blob(frames=9, height=32, width=32, colour=(230, 60, 40)):
    video = np.zeros((frames, height, width, 3), np.uint8)
    for k in range(frames):
        video[k, 8:20, 2 + k : 12 + k] = colour
    return video


@pytest.mark.parametrize("colour", [(230, 60, 40), (20, 200, 90), (60, 80, 250), (255, 255, 255)])
def test_a_small_video_survives_the_codec(tmp_path, colour):
    video = blob(colour=colour)
    path = save_video(video, tmp_path / "a.mp4", fps=8, upscale=4)
    loaded, fps = load_video(path)
    assert (loaded.shape, fps) == ((9, 128, 128, 3), 8.0)
    centres = loaded[:, 1::4, 1::4].astype(int)
    assert np.abs(centres - video).max() <= 24  # at edges, from chroma at half resolution
    assert np.abs(centres - video).mean() < 1
    assert np.abs(centres[0, 14, 6] - colour).max() <= 4


def test_odd_sizes_are_padded_by_one_line(tmp_path):
    loaded, _ = load_video(save_video(blob(3, 31, 33), tmp_path / "a.mp4", fps=25))
    assert loaded.shape == (3, 32, 34, 3)


def test_equal_input_gives_equal_bytes(tmp_path):
    first = save_video(blob(), tmp_path / "a.mp4", fps=8, metadata={"seed": 1})
    second = save_video(blob(), tmp_path / "b.mp4", fps=8, metadata={"seed": 1})
    assert first.read_bytes() == second.read_bytes()


def test_settings_travel_in_the_file(tmp_path):
    settings = {"prompt": 'a "red" seven; = # \\ ü\nnext line', "seed": 3, "steps": 50, "guidance_scale": 5.0}
    assert read_metadata(save_video(blob(), tmp_path / "a.mp4", fps=8, metadata=settings)) == settings
    assert read_metadata(save_video(blob(), tmp_path / "b.mp4", fps=8)) == {}


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = save_video(blob(), tmp_path / "a.mp4", fps=8)
    before = path.read_bytes()
    monkeypatch.setattr(
        "os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(AttarError, match="the disk is full"):
        save_video(blob(colour=(0, 0, 255)), path, fps=8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_refused(tmp_path):
    for frames, name, options in (
        (blob().astype(np.float32), "a.mp4", {}),
        (blob()[0], "a.mp4", {}),
        (blob()[:0], "a.mp4", {}),
        (blob(), "a.gif", {}),
        (blob(), "a.mp4", {"upscale": 0}),
        (blob(), "a.mp4", {"fps": 0}),
    ):
        with pytest.raises(AttarError):
            save_video(frames, tmp_path / name, **{"fps": 8, **options})
    (tmp_path / "text.mp4").write_text("no video")
    for path in (tmp_path / "absent.mp4", tmp_path / "text.mp4"):
        with pytest.raises(AttarError, match=path.name):
            load_video(path)
        with pytest.raises(AttarError, match=path.name):
            read_metadata(path)


def test_to_frames_moves_channels_and_rounds():
    torch.manual_seed(0)
    video = torch.rand(2, 3, 3, 4, 5)
    frames = to_frames(video)
    assert (frames.shape, frames.dtype) == ((2, 3, 4, 5, 3), np.uint8)
    assert frames[1, 2, 3, 4, 0] == round(float(video[1, 2, 0, 3, 4]) * 255)
    assert to_frames(torch.full((1, 1, 1, 2, 2), 2.0)).tolist() == [[[[[255] * 3] * 2] * 2]]
    with pytest.raises(AttarError):
        to_frames(torch.rand(1, 3, 4, 5))


def test_contact_sheet_shows_first_and_last_frame():
    videos = [blob(), blob(colour=(0, 0, 255))]
    sheet = contact_sheet(videos, ["original", "W4A6"], frames=3, upscale=2)
    pixels = np.asarray(sheet)
    assert sheet.mode == "RGB" and sheet.size[0] == 4 + 3 * (64 + 4)
    flat = {tuple(p) for p in pixels.reshape(-1, 3)}
    assert {(230, 60, 40), (0, 0, 255)} <= flat
    last = np.argwhere((pixels == (230, 60, 40)).all(-1))[:, 1].max()
    assert last == 4 + 2 * 68 + 2 * (2 + 8 + 10) - 1  # right edge of the blob in the last frame
    with pytest.raises(AttarError):
        contact_sheet(videos, ["only one"])
    with pytest.raises(AttarError):
        contact_sheet([blob(), blob(height=34)], ["a", "b"])


def test_data_uri_of_path_and_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"\x00abc")
    uri = to_data_uri(tmp_path / "a")
    assert uri == to_data_uri(b"\x00abc") == "data:video/mp4;base64," + base64.b64encode(b"\x00abc").decode()
    with pytest.raises(AttarError, match="absent"):
        to_data_uri(tmp_path / "absent")
