import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from attar.errors import AttarError
from attar.evaluate import charts
from attar.evaluate.report import (
    AttentionMass,
    BlockError,
    ChosenSample,
    ModelFacts,
    ReportData,
    Selection,
    TimestepError,
    VideoPair,
    build_report,
    summarise,
)
from attar.evaluate.statistics import mean_interval

VOID = {"meta", "link", "input", "br", "img", "path", "rect", "circle", "line"}


class Page(HTMLParser):
    """Tag balance, titles of the sections, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.titles, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "poster", "srcset")]
        if tag == "h2" and "id" in attributes:
            self.titles.append(attributes["id"])

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def bare(data):
    """The same report with nothing that may be left out."""
    pairs = [VideoPair(pair.prompt, pair.reference, pair.compressed) for pair in data.pairs]
    models = {"reference": ModelFacts("a", "bf16"), "compressed": ModelFacts("b", "W4A6")}
    empty = {"block_errors": [], "attention": [], "timestep_errors": [], "plan": [], "notes": []}
    return replace(data, pairs=pairs, selection=None, **models, **empty)


def test_the_page_is_self_contained_and_has_every_section(report_data, tmp_path):
    path = build_report(report_data, tmp_path / "report")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(value.startswith("data:") for value in page.fetched)
    assert sum(value.startswith("data:video/mp4;base64,") for value in page.fetched) == 4
    assert not re.search(r"https?://|@import|url\(", text)
    sections = ["videos", "quality", "blocks", "steps", "selection", "attention", "size", "plan", "notes"]
    assert page.titles == [f"{name}-title" for name in sections]
    assert "reference backend: exact, not fast" in page.text
    assert "2.50× slower than 2.00 s" in page.text
    assert sorted(p.name for p in path.parent.iterdir()) == ["index.html", "report.json"]


def test_sections_without_data_vanish(report_data, tmp_path):
    page = Page(build_report(bare(report_data), tmp_path).read_text(encoding="utf-8"))
    assert page.titles == ["videos-title"]
    assert "<svg viewBox" in (tmp_path / "index.html").read_text()  # the icons
    assert not re.search(r"\b(None|nan|Undefined)\b", page.text)
    assert "PSNR" not in page.text and "Size" not in page.text


@pytest.mark.parametrize(
    "missing", ["selection", "block_errors", "attention", "timestep_errors", "plan", "notes"]
)
def test_each_section_can_be_missing_alone(report_data, tmp_path, missing):
    empty = None if missing == "selection" else []
    full = Page(build_report(report_data, tmp_path).read_text(encoding="utf-8")).titles
    fewer = Page(
        build_report(replace(report_data, **{missing: empty}), tmp_path).read_text(encoding="utf-8")
    ).titles
    assert len(full) - len(fewer) == (0 if missing == "notes" else 1)  # backend notes remain


def test_text_is_escaped_everywhere(report_data, tmp_path):
    evil = "<script>alert(1)</script>\"'&"
    data = replace(
        report_data,
        title=evil,
        notes=[evil],
        block_errors=[BlockError(evil, 1, 0.5)],
        attention=[AttentionMass(evil, [0, 1], {5: 0.1, 95: 0.2})],
        selection=Selection(evil, [evil], [[1.0]], [ChosenSample(0, 0, 1.0)]),
        pairs=[replace(pair, prompt=evil) for pair in report_data.pairs],
    )
    text = build_report(data, tmp_path).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("<script") == 1
    Page(text)


def test_json_goes_there_and_back(report_data, tmp_path):
    assert ReportData.from_json(report_data.to_json()) == report_data
    build_report(report_data, tmp_path)
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in text
    written = ReportData.from_json(text)
    assert written.summary == summarise(report_data.pairs)
    assert written.pairs[0].psnr == math.inf
    assert not written.pairs[0].reference.startswith("/")
    assert (tmp_path / written.pairs[0].reference).is_file()
    assert written.pairs[1].reference.startswith("data:video/mp4")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_summary_counts_attributes_and_leaves_identical_videos_out(report_data):
    summary = summarise(report_data.pairs)
    assert (summary.psnr.mean, summary.psnr.count, summary.psnr.infinite) == (14.2, 1, 1)
    assert (
        summary.ssim.mean == pytest.approx(0.85) and summary.ssim.high == 1.0
    )  # the t-interval would pass it
    assert list(summary.accuracy) == ["digit", "colour", "all"]
    shares = {name: (a.reference.mean, a.compressed.mean) for name, a in summary.accuracy.items()}
    assert shares == {"digit": (1, 0.5), "colour": (1, 1), "all": (1, 0.5)}


def test_a_summary_over_more_videos_takes_the_place_of_the_computed_one(report_data, tmp_path):
    summary = replace(
        summarise(report_data.pairs), videos=200, latent_error=mean_interval([0.05, 0.06, 0.07])
    )
    page = Page(build_report(replace(report_data, summary=summary), tmp_path).read_text(encoding="utf-8"))
    assert "Error of the final latents0.060" in page.text
    assert ReportData.from_json((tmp_path / "report.json").read_text(encoding="utf-8")).summary == summary


def test_all_videos_identical_is_shown_as_infinite(report_data, tmp_path):
    data = replace(report_data, pairs=[report_data.pairs[0]])
    page = Page(build_report(data, tmp_path).read_text(encoding="utf-8"))
    assert "∞" in page.text and "all 1 videos identical" in page.text


def broken(data):
    pair = data.pairs[0]
    yield replace(data, pairs=[]), "at least one pair"
    yield replace(data, pairs=[replace(pair, reference="absent.mp4")]), "absent.mp4"
    yield replace(data, pairs=[replace(pair, compressed=b"not an mp4 at all")]), r"pairs\[0\]\.compressed"
    yield replace(data, pairs=[replace(pair, compressed="data:video/mp4;base64,§§§§")]), "not a video"
    yield replace(data, pairs=[replace(pair, psnr=math.nan)]), "pairs.psnr"
    yield replace(data, pairs=[replace(pair, psnr="high")]), r"pairs\.0\.psnr"
    yield replace(data, generation=replace(data.generation, extra={"scheduler": object()})), "plain Python"
    yield replace(data, pairs=[replace(pair, compressed_quality={"digit": True})]), "different attributes"
    yield replace(data, generation=replace(data.generation, fps=0)), "generation"
    yield replace(data, compressed=ModelFacts("a", "b", {"vae": -1})), "negative"
    yield replace(data, block_errors=[BlockError("blocks.0", math.inf, 1)]), "block_errors"
    yield replace(data, timestep_errors=[TimestepError(0, 1, -1)]), "negative"
    yield replace(data, selection=replace(data.selection, scores=[[1.0], [1.0, 2.0], [1.0]])), "score table"
    yield replace(data, selection=replace(data.selection, chosen=[ChosenSample(3, 0, 1)])), "outside"


def test_contradictions_are_refused_before_anything_is_written(report_data, tmp_path):
    for data, word in broken(report_data):
        with pytest.raises(AttarError, match=word):
            build_report(data, tmp_path / "report")
        assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda d: d | {"extra": 1}, "extra"),
        (lambda d: d["generation"].pop("fps") and d, "generation.fps"),
        (lambda d: d["pairs"][0].update(colour=1) or d, "pairs.0.colour"),
        (lambda d: [], "report"),
    ],
)
def test_foreign_json_is_refused_by_name(report_data, change, word):
    content = change(json.loads(report_data.to_json()))
    with pytest.raises(AttarError, match=word):
        ReportData.from_json(json.dumps(content))
    with pytest.raises(AttarError):
        ReportData.from_json("{")


def test_a_full_disk_leaves_the_old_report(report_data, tmp_path, monkeypatch):
    build_report(report_data, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AttarError, match="the disk is full"):
        build_report(replace(report_data, title="new"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_in_the_way_is_said(report_data, tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(AttarError, match="cannot be written"):
        build_report(report_data, tmp_path / "report")


@pytest.mark.parametrize("count", [1, 2, 60])
def test_charts_hold_for_few_and_many_rows_and_flat_values(count):
    drawings = [
        charts.block_errors([BlockError(f"b.{k}", 0.0, 0.0) for k in range(count)]),
        charts.block_errors([BlockError(f"b.{k}", 10.0**-k if k < 9 else 1, 1e-9) for k in range(count)]),
        charts.timestep_errors([TimestepError(k, 1.0, 0.25) for k in range(count)]),
        charts.mass_curves([AttentionMass("b", [0, 1])] * count),
        charts.weight_ranges([AttentionMass("b", weights={50: 1.0})] * count),
        charts.selection_map(Selection("x", ["p"] * count, [[0.0] * count] * count, [])),
        charts.selection_map(
            Selection("x", ["p"] * count, [[2.0] * count] * count, [ChosenSample(0, 0, 2.0)])
        ),
    ]
    for drawing in drawings:
        assert drawing.startswith("<svg") and drawing.endswith("</svg>")
        assert not re.search(r"\b(nan|inf)\b", drawing)
        numbers = [float(n) for n in re.findall(r'\b(?:x|y|x1|x2|y1|y2|cx|cy)="([^"]+)"', drawing)]
        assert min(numbers) >= 0 and max(numbers) <= 4000


def test_chosen_cells_are_marked_and_counted(report_data):
    drawing = charts.selection_map(report_data.selection)
    assert drawing.count('class="heat"') == 18
    assert drawing.count('class="mark"') == 2
    assert drawing.count(", chosen") == 2
    assert "step 5 · score 1, chosen" in drawing
