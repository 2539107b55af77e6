"""The leaderboard's pages, from cells that are made up."""

import json

import pytest

from benchmarks import leaderboard
from benchmarks.cells import LEADERBOARD, digest, key
from benchmarks.leaderboard import Peer, peers, rows_of, write_pages


def cell(method, bits, psnr, **more):
    accuracy = {"all": 0.5}
    return {
        "recipe": digest(method.resolve(bits)), "block_errors": [0.25, 0.75], "psnr": [psnr, psnr + 2], "ssim": [0.5],
        "latent_error": [0.1, 0.2, 0.9], "accuracy": accuracy, "reference_accuracy": accuracy,
        "prompts": LEADERBOARD.prompts, **more,
    }  # fmt: skip


@pytest.fixture
def rows():
    rtn, svd = (next(m for m in LEADERBOARD.methods if m.name == name) for name in ("rtn", "svdquant"))
    cells = {
        key("leaderboard", m.name, (4, 6), s): cell(m, (4, 6), 20.0 + s) for m in (rtn,) for s in (0, 1, 2)
    }
    cells[key("leaderboard", "svdquant", (4, 6), 0)] = cell(svd, (4, 6), 30.0, frechet=0.125)
    speed = {"faster": {"value": 1.5, "low": 1.4, "high": 1.625}}
    return rows_of(cells, {"rtn|W4A6": speed})


def test_rows_are_ordered_and_weighed(rows):
    assert [(r.system, r.bits, len(r.cells)) for r in rows] == [("svdquant", "W4A6", 1), ("rtn", "W4A6", 3)]
    assert 0.25 < rows[1].ratio < 0.27 < 0.4 < rows[0].ratio  # the branch counts
    best, plain = rows[0].figures(), rows[1].figures()
    assert best[3:8] == ["31.00", "0.5000", "0.2000", "0.5000", "0.1250"] and best[9:] == ["–", "–"]
    assert plain[10] == "1.50× (1.40–1.62)"
    assert plain[3].startswith("22.00 ± ") and plain[7] == "–" and plain[8] == "50.0 (50.0)"


def test_pages_stand_alone_and_say_the_same(rows, tmp_path):
    row = {
        "version": "x 1",
        "psnr": 25.0,
        "ssim": 0.9,
        "accuracy": {"all": 1},
        "reference_accuracy": {"all": 1},
    }
    row["seconds_to_quantize"] = 3
    text = write_pages(rows, [Peer("other <int8>", 0.5, row), Peer("told", None, row)], tmp_path)
    html = (tmp_path / "leaderboard.html").read_text()
    assert "| svdquant | 1 |" in text and "<td>svdquant</td>" in html and "<svg" in html
    assert "other &lt;int8&gt;" in html and "<b>linears</b>" in html and "src=" not in html
    assert "simulated" in text and (tmp_path / "images" / "leaderboard.svg").is_file()


def test_peers_are_other_libraries_that_ran(tmp_path):
    row = {"bytes": 50, "psnr": 40.0}
    rows = {"bf16": {"bytes": 100, "psnr": 60.0}, "bf16, compiled": row, "attar rtn": row, "a": row}
    rows |= {"broken": {"error": "x"}, "b": {"bytes": None, "psnr": 50.0}}
    (tmp_path / "peers.json").write_text(json.dumps({"quality": rows}))
    assert [(p.name, p.ratio) for p in peers(tmp_path / "peers.json")] == [("b", None), ("a", 0.5)]
    assert leaderboard.PEERS.is_file()
