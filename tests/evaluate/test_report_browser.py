"""The page in a real browser: everything loads, plays in step, and answers to mouse, finger and keyboard."""

from dataclasses import replace

import numpy as np
import pytest

from attar.evaluate.image import save_image
from attar.evaluate.report import build_report

TIMES = "[...document.querySelectorAll('video')].map(v => v.currentTime)"
PIXELS = """(() => {
  const canvas = document.querySelectorAll('canvas')[%d];
  const pen = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', { willReadFrequently: true });
  pen.drawImage(canvas, 0, 0);
  const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  return Math.max(...data.filter((_, k) => k %% 4 < 3));
})()"""


@pytest.fixture
def page(browser, report_data, tmp_path):
    browser.path = build_report(report_data, tmp_path)
    browser.open(browser.path, height=1600)
    browser.wait("document.body.dataset.loaded === '4'")
    yield browser
    assert browser.problems == []
    assert browser.run("document.body.dataset.errors") == "0"
    assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_videos_play_in_step_and_loop_together(page):
    page.wait("document.body.dataset.advanced === '4'")
    assert page.run("document.body.dataset.status") == "playing"
    page.wait(f"Math.min(...{TIMES}) > 1.0")  # what started late on a busy machine has caught up
    apart = [page.run(f"(t => Math.max(...t) - Math.min(...t))({TIMES})") for _ in range(9)]
    assert sorted(apart)[4] < 0.5 / 8  # the median: less than half a frame while playing
    page.run(
        "(s => { s.value = '2'; s.dispatchEvent(new Event('change')); })(document.getElementById('speed'))"
    )
    page.wait(f"Math.min(...{TIMES}) > 1.2")
    page.wait(f"Math.max(...{TIMES}) < 0.6")  # all began again
    page.key(" ")
    assert page.run("document.body.dataset.status") == "paused"
    page.wait(f"Math.max(...{TIMES}) - Math.min(...{TIMES}) < 0.001")


def test_keys_step_through_frames_and_wrap_around(page):
    # in one go, because the playing clock moves the slider too
    page.run("(s => { s.value = 3; s.dispatchEvent(new Event('input')); })(document.getElementById('scrub'))")
    page.wait(f"{TIMES}.every(t => Math.abs(t - 3.5 / 8) < 0.001)")
    page.key("ArrowRight")
    page.wait(f"{TIMES}.every(t => Math.abs(t - 4.5 / 8) < 0.001)")
    assert page.run("document.getElementById('where').textContent") == "5 / 17"
    for _ in range(5):
        page.key("ArrowLeft")
    page.wait(f"{TIMES}.every(t => Math.abs(t - 16.5 / 8) < 0.001)")
    assert page.run("document.getElementById('scrub').value") == "16"
    page.key(" ")
    page.wait("document.body.dataset.status === 'playing'")


def test_pointing_at_the_compressed_video_shows_the_original(page):
    box = "document.querySelector('.stage').getBoundingClientRect()"
    left, top, width = page.run(f"[{box}.x, {box}.y, {box}.width]")
    swapped = "document.querySelector('.stage').classList.contains('swapped')"
    page.move(left + 0.75 * width, top + 40)
    page.wait(swapped)
    assert (
        page.run("document.querySelector('.stage .is-reference').getBoundingClientRect().x")
        > left + 0.4 * width
    )
    page.move(left + 0.25 * width, top + 40)
    page.wait(f"!{swapped}")
    page.tap(left + 0.25 * width, top + 40)
    page.wait(swapped)
    page.tap(left + 0.25 * width, top + 40)
    page.wait(f"!{swapped}")
    page.key("s")
    page.wait("document.querySelectorAll('.swapped').length === 2")
    page.key("s")


def test_the_difference_is_black_for_equal_videos_and_bright_for_others(page):
    page.key("d")
    page.wait("document.body.classList.contains('with-difference')")
    page.key(" ")
    page.wait(PIXELS % 1 + " > 200")
    assert page.run(PIXELS % 0) == 0
    assert page.run("getComputedStyle(document.querySelector('canvas')).imageRendering") == "pixelated"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_text_is_legible_and_nothing_sticks_out(browser, report_data, tmp_path, width, scheme):
    browser.open(build_report(report_data, tmp_path), width, 900, scheme, motion="reduce")
    browser.wait("document.body.dataset.status === 'paused'")  # asked for reduced motion: no autoplay
    assert browser.run("document.documentElement.scrollWidth") <= width
    low = browser.run(
        """(() => {
      const parse = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
      const light = (colour) => parse(colour).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
        .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
      const behind = (node) => {
        const colour = getComputedStyle(node).backgroundColor;
        return /rgba\\(0, 0, 0, 0\\)|transparent/.test(colour) ? behind(node.parentElement) : colour;
      };
      return [...document.querySelectorAll('p, li, h1, h2, h3, th, td, figcaption, button, small, svg text')]
        .filter((node) => node.textContent.trim() && node.getClientRects().length).map((node) => {
          const svg = node.ownerSVGElement;
          const style = getComputedStyle(node);
          const a = light(svg ? style.fill : style.color);
          const b = light(behind(svg ? svg.parentElement : node));
          return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.tagName, node.textContent];
        }).filter(([contrast]) => contrast < 4.5);
    })()"""
    )
    assert low == []
    assert browser.problems == []


def test_every_control_has_a_name(page):
    nameless = page.run(
        """[...document.querySelectorAll('button, input, select, video, canvas, svg[role], [tabindex]')]
      .filter(n => !(n.getAttribute('aria-label') || n.getAttribute('aria-labelledby') || n.innerText))
      .map(n => n.outerHTML.slice(0, 80))"""
    )
    assert nameless == []


def test_images_have_no_player_but_can_be_swapped_and_subtracted(browser, report_data, tmp_path):
    grey = [np.full((6, 5, 3), value, dtype=np.uint8) for value in (90, 130)]
    files = [save_image(frame, tmp_path / f"{k}.png") for k, frame in enumerate(grey)]
    report_data.pairs = [
        replace(pair, reference=str(files[0]), compressed=str(files[k]))
        for k, pair in enumerate(report_data.pairs)
    ]
    browser.open(build_report(report_data, tmp_path / "report"), 1280, 900)
    browser.wait("document.body.dataset.loaded === '4'")
    assert browser.run("document.body.dataset.images + document.body.dataset.videos") == "40"
    assert browser.run("document.body.dataset.status") == "paused"
    assert browser.run("document.querySelectorAll('#play, #scrub, #speed, video').length") == 0
    for key in (" ", "ArrowRight"):
        browser.key(key)
    browser.key("d")
    browser.wait(PIXELS % 1 + " === 160")  # four times the difference
    assert browser.run(PIXELS % 0) == 0
    browser.key("s")
    browser.wait("document.querySelectorAll('.swapped').length === 2")
    assert browser.run("getComputedStyle(document.querySelector('.stage img')).imageRendering") == "pixelated"
    assert browser.run("document.body.dataset.errors") == "0" and browser.problems == []
