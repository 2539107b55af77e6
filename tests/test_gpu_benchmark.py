"""The GPU benchmark without a GPU: shapes, table, a tiny run on the CPU, and the refusal."""

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.peers.competitors import Competitor


def test_the_linears_of_real_models():
    assert gpu.linear_shapes("wan-1.3b") == {
        "self_attn.q 1536->1536": (1536, 1536),
        "ffn.up 1536->8960": (1536, 8960),
        "ffn.down 8960->1536": (8960, 1536),
    }
    sizes = set(gpu.linear_shapes("hunyuan").values())
    assert {(3072, 3072), (3072, 12288), (12288, 3072)} <= sizes
    assert (3072, 18432) not in sizes  # modulation


def broken(task):
    raise RuntimeError("no kernel | for this device")


def test_a_tiny_run_and_its_table(monkeypatch):
    monkeypatch.setattr(gpu, "REPEATS", 2)
    chosen = tuple(c for c in gpu.COMPETITORS if c.name in ("bf16", "attar rtn W4A8", "attar rtn W4A16"))
    rows = gpu.measure_linear((*chosen, Competitor("broken", "torch", broken)), (256, 192), 24, 3, "cpu")
    assert rows["bf16"]["faster"]["value"] == 1.0 and rows["bf16"]["bytes"] == 2 * 257 * 192
    four = rows["attar rtn W4A8"]
    assert four["bytes"] == 192 * (128 + 4 + 2)
    assert four["tera_operations"] == pytest.approx(2e-12 * 24 * 256 * 192 / four["seconds"])
    study = {"linears": {"ffn.up 256->192": rows}, "block": {"bf16": {"error": "x | y"}}}
    content = {
        "device": "GPU 1",
        "backend": "triton: kernels",
        "versions": gpu.versions(),
        "studies": {"wan, 24 tokens": study},
    }
    text = gpu.table(content)
    assert "## wan, 24 tokens" in text and f"torch {torch.__version__}" in text
    assert "| ffn.up 256->192 | broken | RuntimeError: no kernel / for this device | | | |" in text
    row = next(line for line in text.splitlines() if "| attar rtn W4A8 |" in line)
    assert f"({four['bytes'] / rows['bf16']['bytes']:.3f}×)" in row and row.count("|") == 7


def test_results_are_named_after_the_device():
    assert gpu.results_path("NVIDIA H100 80GB HBM3").name == "gpu-nvidia-h100-80gb-hbm3.json"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert "benchmarks.gpu measures a CUDA device, and this machine has none." in done.stderr
