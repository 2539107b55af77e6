"""The comparison with other libraries: what runs is measured side by side, what fails is shown with its error."""

from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.peers.competitors import COMPETITORS, Competitor, Task
from benchmarks.peers.quality import linear_bytes
from benchmarks.peers.speed import OneBlock, measure_speed
from benchmarks.peers.table import write_table
from benchmarks.scatter import FRONTIER, MANY, Point, frontier, scatter


def broken(task: Task) -> nn.Module:
    raise RuntimeError("no kernel | for this processor")


def test_names_are_unique():
    names = [competitor.name for competitor in COMPETITORS]
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_speed_of_all_in_one_run():
    chosen = [c for c in COMPETITORS if c.name in ("bf16", "attar rtn W8A8", "ModelOpt INT4 AWQ")]
    rows = measure_speed([*chosen, Competitor("broken", "torch", broken)], "wan-1.3b", tokens=16, rounds=3)
    assert rows["bf16"]["faster"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert rows["attar rtn W8A8"]["seconds"] > 0
    assert 0.5 <= rows["attar rtn W8A8"]["bytes"] / rows["bf16"]["bytes"] < 0.52
    assert "simulated" in rows["ModelOpt INT4 AWQ"]["error"]
    assert rows["broken"]["error"] == "RuntimeError: no kernel | for this processor"


def test_only_the_linears_of_blocks_are_weighed():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "blocks": nn.ModuleList([nn.Linear(4, 4, bias=False)])})
    assert linear_bytes(model) == 64
    assert linear_bytes(OneBlock(nn.Linear(4, 4, bias=False).to(torch.bfloat16), ("x",))) == 32


def test_the_page_shows_failures_beside_figures(tmp_path):
    accuracy = {"all": 0.5}
    good = {
        "version": "torch 2", "psnr": 40.0, "ssim": 0.99, "accuracy": accuracy, "reference_accuracy": {"all": 1.0},
        "bytes": 1_000_000, "seconds_to_quantize": 3.0,
    }  # fmt: skip
    failed = {"version": "x 1", "error": "RuntimeError: no kernel | for this processor"}
    ratio = {"value": 1.5, "low": 1.4, "high": 1.6}
    speed = {"version": "torch 2", "seconds": 0.5, "bytes": 250_000, "faster": ratio}
    results = {
        "quality": {"bf16": good, "other": failed},
        "speed": {
            "wan": {"device": "a CPU", "threads": 1, "rounds": 3, "rows": {"bf16": speed, "other": failed}}
        },
    }
    text = write_table(results, tmp_path / "peers.md")
    assert "| bf16 | torch 2 | 40.00 | 0.9900 | 50.0 (100.0) | 1.0 MB (1.000×) | 3 |" in text
    assert "| bf16 | 500 | 1.50 (1.40 – 1.60) | 0.2 MB (1.000×) |" in text
    assert text.count("RuntimeError: no kernel / for this processor") == 2
    for name, place in (("peers-size.svg", "bf16: 1, 40"), ("peers-latency.svg", "bf16: 500, 40")):
        picture = ElementTree.parse(tmp_path / "images" / name)
        assert [title.text for title in picture.iter("{http://www.w3.org/2000/svg}title")] == [place]
        assert f"images/{name}" in text


def test_points_lie_where_their_values_say():
    points = [Point(1, 10, "small & good", "a"), Point(100, 20, "large", "b"), Point(10, 15, "middle", "a")]
    tree = ElementTree.fromstring(scatter(points, "a title", "MB", "dB"))
    marks = [c for c in tree.iter("{http://www.w3.org/2000/svg}circle") if len(c)]
    (x1, x2, x3), (y1, y2, y3) = ([float(c.get(name)) for c in marks] for name in ("cx", "cy"))
    assert x3 == pytest.approx((x1 + x2) / 2, abs=0.1) and x1 < x2  # a logarithmic axis
    assert y3 == pytest.approx((y1 + y2) / 2, abs=0.1) and y2 < y1  # more is higher
    assert marks[0].get("fill") == marks[2].get("fill") != marks[1].get("fill")
    assert marks[0][0].text == "small & good: 1, 10"
    with pytest.raises(ValueError, match="finite"):
        scatter([Point(1, float("inf"), "x", "a")], "", "", "")


def dominates(a, b):
    return (a.x <= b.x and a.y > b.y) or (a.x < b.x and a.y >= b.y)


small = st.integers(0, 6)  # so that many points share a place or a side


@given(st.lists(st.builds(Point, small, small, st.text(max_size=2), st.just("")), min_size=1, max_size=25))
def test_no_point_dominates_the_frontier_and_every_other_is_dominated(points):
    best = frontier(points)
    assert best == sorted(best, key=lambda p: (p.x, p.y)) and len(best) <= len(points)
    for point in points:
        assert any(dominates(other, point) for other in points) != (point in best)
    assert all(best.count(p) == points.count(p) for p in points if p in best)


@pytest.mark.parametrize("count", [4, MANY + 4])
def test_the_frontier_is_drawn_and_of_many_points_it_alone_has_numbers(count):
    points = [Point(1 + k / count, 10 - k, f"point {k}", "a") for k in range(count - 1)]
    points.append(Point(3, 20, "large", "b"))
    tree = ElementTree.fromstring(scatter(points, "a title", "MB", "dB"))
    texts = ["".join(t.itertext()) for t in tree.iter("{http://www.w3.org/2000/svg}text")]
    marks = [c for c in tree.iter("{http://www.w3.org/2000/svg}circle") if len(c)]
    assert len(marks) == count and FRONTIER in texts and ("point 1" in texts) == (count <= MANY)
    ringed = {c[0].text: (float(c.get("cx")), float(c.get("cy"))) for c in marks if c.get("stroke")}
    assert list(ringed) == ["point 0: 1, 10", "large: 3, 20"]
    (x1, y1), (x2, y2) = ringed.values()
    assert (
        next(tree.iter("{http://www.w3.org/2000/svg}path"))
        .get("d")
        .startswith(f"M{x1:.1f} {y1:.1f} H{x2:.1f} V{y2:.1f} H")
    )
