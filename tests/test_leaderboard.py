"""The leaderboard's pages, from cells that are made up."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import ablations, latency, leaderboard, leading, pictures
from benchmarks.cells import LEADERBOARD, MAIN, STUDIES, complete, digest, find_cell, key
from benchmarks.leaderboard import Peer, peers, rows_of, write_pages


def cell(method, bits, psnr, **more):
    accuracy = {"all": 0.5}
    return {
        "recipe": digest(method.resolve(bits)), "block_errors": [0.25, 0.75], "psnr": [psnr, psnr + 2], "ssim": [0.5],
        "latent_error": [0.1, 0.2, 0.9], "accuracy": accuracy, "reference_accuracy": accuracy,
        "prompts": LEADERBOARD.prompts,
    } | more  # fmt: skip


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
    parts = [["attar", "shifts <x>", "W4A4", "1", "-21.6", "–"]]
    picture = {
        "linears": 0.25,
        "psnr": [40.0],
        "ssim": [0.9],
        "frechet": 0.5,
        "right": 1,
        "reference_right": 1,
    }
    own = [["quest", "chosen <layers>", "W4A4", "1", "+0.5 ± 0.1"]]
    still = pictures.rows_of({"digits-dit|svdquant|W4A4|0": picture, "digits-dit|unknown|W4A4|0": picture})
    text = write_pages(
        rows, [Peer("other <int8>", 0.5, row), Peer("told", None, row)], parts, still, own, tmp_path
    )
    html = (tmp_path / "leaderboard.html").read_text()
    assert "| svdquant | 1 |" in text and "<td>svdquant</td>" in html and "<svg" in html
    assert "other &lt;int8&gt;" in html and "<b>linears</b>" in html and "src=" not in html
    assert "| attar | shifts <x> | W4A4 | 1 |" in text and "<td>shifts &lt;x&gt;</td>" in html
    assert "<td>chosen &lt;layers&gt;</td>" in html
    assert "<h1>Leaderboard: digits-dit</h1>" in html and html.count("<svg") == 2 and "unknown" not in html
    assert "simulated" in text and (tmp_path / "images" / "leaderboard.svg").is_file()


def test_parts_are_paired():
    """Over seeds, over prompts where there is one, and only where both sides were measured as they are now."""
    without, having = (next(m for m in MAIN.methods if m.name == n) for n in ("learned base", "base + SDS"))
    cells = {}
    for seed, (before, after) in enumerate(((20.0, 21.0), (22.0, 24.0))):
        cells[key("main", without.name, (4, 6), seed)] = cell(without, (4, 6), before)
        cells[key("main", having.name, (4, 6), seed)] = cell(having, (4, 6), after, block_errors=[0.3, 0.6])
    cells[key("main", without.name, (4, 4), 0)] = cell(without, (4, 4), 20.0)
    cells[key("main", having.name, (4, 4), 0)] = {**cell(having, (4, 4), 0.0), "psnr": [21.0, 25.0]}
    cells[key("main", without.name, (3, 6), 0)] = cell(without, (3, 6), 20.0)
    cells[key("main", having.name, (3, 6), 0)] = cell(having, (3, 6), 20.0, recipe="another")
    first, second = ablations.rows(cells)
    assert first == [
        "S²Q-VDiT",
        "salient samples (SDS)",
        "W4A6",
        "2",
        "-10.0 ± 0.0",
        "+1.50 ± 6.35",
        first[6],
    ]
    left, right = (float(size.rstrip("×")) for size in first[6].split(" → "))
    assert 0.25 < left == right < 0.29
    assert second[2:5] == ["W4A4", "1", "+0.0"] and second[5] == "+2.00 ± 12.71"


def test_every_part_is_in_its_study():
    for part in ablations.PARTS:
        methods = {method.name: method for method in STUDIES[part.study].methods}
        for bits in {*STUDIES[part.study].bits} & {*ablations.BITS}:
            sides = {digest(methods[name].resolve(bits)) for name in (part.without, part.having)}
            there = part.name != "branches of rank 8" or bits[1] <= 4
            assert len(sides) == 1 + there, (part, bits)


def test_peers_are_other_libraries_that_ran(tmp_path):
    row = {"bytes": 50, "psnr": 40.0}
    rows = {"bf16": {"bytes": 100, "psnr": 60.0}, "bf16, compiled": row, "attar rtn": row, "a": row}
    rows |= {"broken": {"error": "x"}, "b": {"bytes": None, "psnr": 50.0}}
    (tmp_path / "peers.json").write_text(json.dumps({"quality": rows}))
    assert [(p.name, p.ratio) for p in peers(tmp_path / "peers.json")] == [("b", None), ("a", 0.5)]
    assert leaderboard.PEERS.is_file()


DOCS = Path(__file__).parents[1] / "docs"


def still(psnr, ssim=0.9, right=1.0):
    return {
        "psnr": psnr, "ssim": [ssim], "frechet": 0.5, "right": right, "reference_right": 1.0, "linears": 0.25,
    }  # fmt: skip


def test_the_lead_is_paired_and_says_where_it_is_none():
    cells = {
        **{f"digits-dit|attar|W4A4|{s}": still([40.0, 40.0 + 2 * s]) for s in (0, 1)},
        **{f"digits-dit|attar-ptq|W4A4|{s}": still([39.0 - s], ssim=0.95) for s in (1, 0)},
        "digits-dit|svdquant|W4A4|1": still([38.0, 38.0]),
        "digits-dit|attar, without branches|W4A4|0": still([50.0], ssim=1.0),
        "digits-dit|attar|W8A8|0": still([50.0, 52.0, 51.0], right=0.5),
        "digits-dit|rtn|W8A8|0": still([51.0, 53.5, 52.5]),
        "digits-dit|attar|W2A6|0": still([50.0]),
    }
    ranked = [row for row in pictures.rows_of(cells) if row.model == "digits-dit"]
    own, published, eight = leading.rows(ranked)
    assert own == ["W4A4", "attar-ptq", "2", "+2.00 ± 12.71", "holds 0", "0.250×, 0.250×"]
    assert published == ["W4A4", "svdquant", "1", "+3.00 ± 12.71", "holds 0", "0.250×, 0.250×"]
    assert eight[:3] == ["W8A8", "rtn", "1"] and eight[3].startswith("-1.33 ± ") and eight[4] == "below 0"
    said = leading.elsewhere(ranked)
    assert "by SSIM it is not at W4A4 (attar-ptq 0.9500 for 0.9000); by prompts" in said.replace("By", "by")
    assert "W8A8 (rtn 100.0 for 50.0)" in said and "branches" not in said
    page = pictures.table(pictures.rows_of(cells), [])
    assert f"digits-dit: {leading.TITLE}" in page and "| W8A8 | rtn | 1 | -1.33 ± " in page


def test_speeds_of_peers_are_of_the_same_machine_and_block(tmp_path):
    where = {"model": "wan", "tokens": 8, "processor": "a CPU", "threads": 1}
    ours, theirs = tmp_path / "latency.json", tmp_path / "peers.json"
    ours.write_text(json.dumps({"environment": where, "rows": {"bf16": {"seconds": 0.4}}}))
    fast = {"faster": {"value": 1.5, "low": 1.4, "high": 1.625}, "seconds": 0.5}
    study = {"threads": 1, "rows": {"bf16": fast, "a": fast}}
    for title, threads, found in (("a CPU", 1, True), ("another CPU", 1, False), ("a CPU", 2, False)):
        speed = {f"wan, 8 tokens, {title}": {**study, "threads": threads}}
        theirs.write_text(json.dumps({"quality": {}, "speed": speed}))
        assert bool(leaderboard.speeds_of_peers(theirs, ours)) is found
        assert ("500 ms there and 400 ms" in leaderboard.said_of_peers(theirs, ours)) is found
    assert leaderboard.speed_text(fast) == "1.50× (1.40–1.62)" and leaderboard.speed_text(None) == "–"
    assert leaderboard.speeds_of_peers() and latency.RESULTS.is_file()


def test_speeds_on_another_processor(tmp_path, monkeypatch):
    """A file for each kind of processor; what is not that of the column has a table of its own."""
    monkeypatch.setattr(latency, "FOLDER", tmp_path)
    monkeypatch.setattr(latency, "RESULTS", tmp_path / "latency.json")
    assert latency.results_path("a CPU") == tmp_path / "latency.json" and latency.elsewhere() == []
    (tmp_path / "latency.json").write_text(json.dumps({"environment": {"processor": "a CPU"}, "rows": {}}))
    assert latency.results_path("a CPU") == tmp_path / "latency.json"
    other = latency.results_path("AMD (R) EPYC, AVX2")
    assert other == tmp_path / "latency-amd-r-epyc-avx2.json"
    fast = {"faster": {"value": 1.5, "low": 1.4, "high": 1.625}}
    where = {"processor": "AMD EPYC, AVX2", "backend": "cpu: compiled kernels (avx2) with integers"}
    rows = {"bf16": {"seconds": 0.4}, "rtn|W4A6": fast, "rtn|W4A4": fast, "lrq-dit|W4A6": {"error": "x"}}
    other.write_text(json.dumps({"environment": where, "rows": rows}))
    section = leaderboard.speeds_elsewhere(*latency.elsewhere())
    assert section.title == "Block speed: AMD EPYC, AVX2" and section.columns == ("system", "W4A6", "W4A4")
    assert section.rows == [["rtn", "1.50× (1.40–1.62)", "1.50× (1.40–1.62)"], ["lrq-dit", "–", "–"]]
    assert "compiled kernels (avx2)" in section.said and "took 400 ms" in section.said.replace("\n", " ")


def test_latents_of_pictures_are_those_that_are_decoded():
    bench = object.__new__(pictures.PictureBench)
    bench.source = pictures.find_source("digits-image")
    bench.seed, bench.shown = 0, ["the digit three written in yellow", "the digit seven written in green"]
    bench.call = bench.source.call_arguments(num_inference_steps=2)
    pipe = bench.load()
    made, latents = bench.pictures(pipe)
    assert made.shape == (2, 1, 3, 32, 32) and latents.shape == (2, 4, 8, 8)
    assert "decode" not in vars(pipe.vae)
    decoded = pipe.image_processor.postprocess(pipe.vae.decode(latents).sample.detach(), output_type="pt")
    assert (decoded - made[:, 0]).abs().max() < 1e-5


def test_one_command_fills_every_model(monkeypatch):
    seen = []
    monkeypatch.setattr(leaderboard.quality, "run", lambda args: seen.append(args))
    monkeypatch.setattr(leaderboard.pictures, "run", lambda args: seen.append(args))
    asked = {
        "bits": None, "only": ["svd"], "seeds": [0], "steps": 2, "work": Path("a"), "results": Path("b"),
        "work_pictures": Path("c"), "results_pictures": Path("d"),
    }  # fmt: skip
    leaderboard.fill(argparse.Namespace(models=["digits-video", "digits-dit"], **asked))
    videos, stills = seen
    assert videos.studies == ["leaderboard"] and videos.bits is None and videos.results == Path("b")
    assert stills.models == ["digits-dit"] and stills.bits == list(pictures.BITS)
    assert stills.only == ["svdquant", "attar, as large as svdquant"]
    assert (stills.work, stills.results, stills.steps, stills.seeds) == (Path("c"), Path("d"), 2, [0])
    leaderboard.fill(argparse.Namespace(models=["digits-image"], **{**asked, "only": ["nothing"]}))
    assert len(seen) == 2


def test_the_pages_are_those_of_the_results(tmp_path):
    leaderboard.write_all(folder=tmp_path)
    for name in ("leaderboard.md", "leaderboard.html", "pictures.md"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text(), f"write docs/{name} again"
    for image in (tmp_path / "images").iterdir():
        assert image.read_text() == (DOCS / "images" / image.name).read_text(), f"write {image.name} again"


def test_of_several_cells_that_with_all_figures_is_shown():
    method, bits = next(m for m in LEADERBOARD.methods if m.name == "rtn"), (4, 6)
    older = next(m for m in MAIN.methods if digest(m.resolve(bits)) == digest(method.resolve(bits)))
    cells = {key("main", older.name, bits, 0): cell(older, bits, 20.0)}
    found = find_cell(cells, LEADERBOARD, method, bits, 0)
    assert found["psnr"][0] == 20.0 and not complete(LEADERBOARD, found)
    cells[key("leaderboard", "rtn", bits, 0)] = cell(method, bits, 21.0, frechet=0.5)
    found = find_cell(cells, LEADERBOARD, method, bits, 0)
    assert found["psnr"][0] == 21.0 and complete(LEADERBOARD, found)
    assert find_cell(cells, LEADERBOARD, method, bits, 1) is None
    assert complete(STUDIES["lrq-dit"], {})  # of blocks alone
