"""`attar bench` from the command line."""

import json

import pytest

pytestmark = pytest.mark.usefixtures("small_limit")


def test_a_compressed_folder_is_measured_with_its_own_blocks(cli, wan_folder, tmp_path):
    packed = tmp_path / "packed"
    assert cli("compress", wan_folder, "--recipe", "rtn", "-o", packed).code == 0
    done = cli("bench", packed, "--tokens", "32", "--rounds", "3", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["what"] == "its own packed blocks"
    assert result["disk_bytes"]["transformer"] > 0
    assert result["weight_bytes"]["share"] < 0.5
    assert "cpu" in result["backend"] or "reference" in result["backend"]


def test_the_table_says_what_ran(cli):
    done = cli("bench", "digits-video", "--tokens", "32", "--rounds", "3", "--backend", "reference")
    assert done.code == 0, done.err
    for word in ("self_attn.q", "linears", "whole", "reference", "times faster", "packed"):
        assert word in done.out


def test_requests_that_make_no_sense_are_refused_in_one_line(cli):
    for arguments in (
        (),
        ("digits-video", "--shape", "wan-1.3b"),
        ("--shape", "wan-99b"),
        ("digits-video", "--dtype", "int3"),
        ("digits-video", "--backend", "abacus"),
    ):
        done = cli("bench", *arguments)
        assert done.code != 0
        assert len(done.err.strip().splitlines()) == 1, done.err


@pytest.mark.slow
def test_a_budget_is_timed_with_its_mean_bits_or_refused(cli):
    options = ("bench", "--shape", "wan-1.3b", "--tokens", "4", "--text-tokens", "2", "--rounds", "3")
    budget = ("--recipe", "rtn", "--set")
    assert cli(*options, *budget, "allocate.budget=same").code == 0
    message = cli(*options, *budget, "allocate.budget=3.5bits").message
    assert "not known yet" in message and "--weights" in message
