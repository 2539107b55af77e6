"""Which parameters of a test marked `slow(but=[...])` run always, however tests are asked for."""

import pytest
from support import slow

TESTS = """
import pytest

@pytest.mark.slow(but=["1"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_one(n):
    assert n != 1

@pytest.mark.slow(but=[{but}])
@pytest.mark.parametrize("n", [1, 2])
def test_two(n):
    pass
"""


class Ran:
    def __init__(self):
        self.tests, self.errors = set(), ""

    def pytest_runtest_call(self, item):
        self.tests.add(item.name)

    def pytest_collectreport(self, report):
        self.errors += report.longreprtext if report.failed else ""


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the tests of files of their own; returns what ran, and the errors in collecting them."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: s\naddopts = --import-mode=importlib\n")

    def run(*arguments, **files):
        for name, but in files.items():
            (tmp_path / f"test_{name}.py").write_text(TESTS.replace("{but}", but))
        places = [str(tmp_path / a) if a.startswith("test_") else a for a in arguments]
        if places == list(arguments):
            places.append(str(tmp_path))
        ran = Ran()
        pytest.main(["-q", "-c", str(tmp_path / "pytest.ini"), *places], plugins=[slow, ran])
        capsys.readouterr()
        return ran.tests, ran.errors

    return run


def test_parameters_that_are_named_are_not_slow(run):
    assert run("-m", "not slow", first='"2"') == ({"test_one[1]", "test_two[2]"}, "")
    assert run("-m", "slow") == ({"test_one[2]", "test_one[3]", "test_two[1]"}, "")


def test_some_of_the_parameters_can_be_asked_for(run):
    """By their ids, by a word, or as those that failed."""
    assert run("test_first.py::test_one[2]", first='"2"') == ({"test_one[2]"}, "")
    assert run("-k", "two") == ({"test_two[1]", "test_two[2]"}, "")
    assert len(run()[0]) == 5
    assert run("--lf") == ({"test_one[1]"}, "")


def test_names_that_are_not_there_are_refused_beside_a_file_that_has_them(run):
    ran, errors = run(first='"2"', second='"2", "3"')
    assert "of test_two names parameters that are not there: ['3']" in errors
    assert "names parameters" in run("test_second.py::test_two[1]")[1]
    assert ran == set()
