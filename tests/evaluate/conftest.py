"""A headless Chromium driven through its DevTools pipe: JSON messages that end in a zero byte."""

from __future__ import annotations

import json
import math
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attar.evaluate.report import (
    AttentionMass,
    BlockError,
    ChosenSample,
    Generation,
    ModelFacts,
    PlanRow,
    ReportData,
    Selection,
    TimestepError,
    VideoPair,
)
from attar.evaluate.video import save_video

# Chromium talks on descriptors 3 and 4. Both ends are first moved out of the way, since they may be 4 and 3.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3), os.dup2(ends[1], 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of one browser. `problems` collects console errors and uncaught exceptions."""

    def __init__(self, binary: str, profile: Path) -> None:
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--mute-audio", "--no-first-run"]
        flags += [
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--autoplay-policy=no-user-gesture-required",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(read_there), str(write_there), binary, *flags, "about:blank"],
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
        )
        os.close(read_there)
        os.close(write_there)
        self._in, self._out, self._buffer, self._count = read_here, write_here, b"", 0
        self.problems: list[str] = []
        self.requests: list[str] = []
        targets = self._send("Target.getTargets", session=None)["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self._send("Target.attachToTarget", {"targetId": page, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._send(f"{domain}.enable")

    def open(
        self,
        path: Path,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        motion: str = "no-preference",
    ) -> None:
        self.problems.clear()
        self.requests.clear()
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._send("Emulation.setDeviceMetricsOverride", metrics)
        features = [("prefers-color-scheme", scheme), ("prefers-reduced-motion", motion)]
        self._send("Emulation.setEmulatedMedia", {"features": [{"name": n, "value": v} for n, v in features]})
        self._navigate(path.resolve().as_uri())

    def leave(self) -> None:
        """To an empty page: a report plays its videos for as long as it is open."""
        self._navigate("about:blank")

    def _navigate(self, url: str) -> None:
        self._loaded = False
        self._send("Page.navigate", {"url": url})
        end = time.monotonic() + 30
        while not self._loaded:
            self._note(self._receive(end, "Page.navigate"))

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self._send(
            "Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True}
        )
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str, seconds: float = 30) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}; {self.problems}"
            time.sleep(0.05)

    def key(self, key: str) -> None:
        text = {"text": key} if len(key) == 1 else {}
        self._send("Input.dispatchKeyEvent", {"type": "keyDown", "key": key, **text})
        self._send("Input.dispatchKeyEvent", {"type": "keyUp", "key": key})

    def move(self, x: float, y: float) -> None:
        self._send("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y, "pointerType": "mouse"})

    def tap(self, x: float, y: float) -> None:
        self._send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
        self._send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    def close(self) -> None:
        try:
            self._send("Browser.close", session=None)
            self.process.wait(5)
        except (OSError, AssertionError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def _send(self, method: str, parameters: dict | None = None, session: str | None = "page") -> dict:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters or {}}
        if session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 30
        while True:
            answer = self._receive(end, method)
            if answer.get("id") == message["id"]:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self, end: float, method: str) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser did not answer {method}"
            chunk = os.read(self._in, 1 << 20)
            assert chunk, "the browser closed its pipe"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict) -> None:
        kind, details = event.get("method"), event.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Runtime.exceptionThrown":
            self.problems.append(str(details["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.problems.append(str(details["args"]))
        elif kind == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.problems.append(details["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip(
            f"no Chromium here (looked for {', '.join(names)}); install one to test the report in a browser"
        )
    session = Browser(binary, tmp_path_factory.mktemp("chromium"))
    yield session
    session.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    yield chromium
    chromium.leave()


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Two pairs of 17-frame 32×32 clips of a moving square; the second differs by a shift of 4 pixels."""
    folder, pairs = tmp_path_factory.mktemp("clips"), []
    for index, (colour, shift) in enumerate([((230, 60, 40), 0), ((60, 90, 240), 4)]):
        paths = []
        for name, offset in (("reference", 0), ("compressed", shift)):
            video = np.zeros((17, 32, 32, 3), np.uint8)
            for k in range(17):
                video[k, 10 + offset : 20 + offset, k : k + 10] = colour
            paths.append(save_video(video, folder / f"{index}-{name}.mp4", fps=8, upscale=4))
        pairs.append((paths[0], paths[1]))
    return pairs


@pytest.fixture
def report_data(clips: list[tuple[Path, Path]]) -> ReportData:
    """A report with every section."""
    right, wrong = {"digit": True, "colour": True}, {"digit": False, "colour": True}
    pairs = [
        VideoPair(
            "a <b>red</b> seven & drifts right", clips[0][0], clips[0][1], math.inf, 1.0, right, right, seed=0
        ),
        VideoPair(
            "a blue square drifts right",
            clips[1][0].read_bytes(),
            clips[1][1],
            14.2,
            0.7,
            right,
            wrong,
            seed=1,
        ),
    ]
    scores = [[p * t / 10 for t in range(6)] for p in range(3)]
    return ReportData(
        title="moving squares at W4A6",
        reference=ModelFacts("squares", "bf16", {"transformer": 4000, "vae": 500}, seconds_per_video=2.0),
        compressed=ModelFacts(
            *("squares-w4a6", "W4A6", {"transformer": 1000, "vae": 500}, "s2q-vdit"),
            *("reference backend: exact, not fast", 5.0, "2 CPU cores"),
        ),
        generation=Generation(6, 5.0, 0, 8, 17, 32, 32, {"scheduler": "flow matching"}),
        pairs=pairs,
        selection=Selection(
            "salient", ["one", "two", "three"], scores, [ChosenSample(2, 5, 1.0), ChosenSample(2, 4, 0.8)]
        ),
        block_errors=[BlockError(f"blocks.{k}", 0.1 * (k + 1), 0.002 * (k + 1)) for k in range(4)],
        attention=[
            AttentionMass(f"blocks.{k}", [0, 0.5, 0.8, 1], {5: 0.5, 50: 0.6, 95: 0.9}) for k in range(4)
        ],
        timestep_errors=[TimestepError(k, 1000 - 166 * k, 0.01 * (k + 1)) for k in range(6)],
        plan=[PlanRow("ffn.up", "W4A6", 4, 4096), PlanRow("head", "bf16", 1, 64, "kept in high precision")],
        notes=["Two videos tell nothing about accuracy."],
    )
