"""The fork server of the tests."""

import gc
import operator

import pytest
from ranks import run_ranks
from scripts_of import fork_script


def test_a_rank_finds_everything_imported() -> None:
    # A fork server that cannot import a module goes on without a word, and every test takes a second more.
    (frozen,) = run_ranks(gc.get_freeze_count, 1)
    assert frozen > 0


def test_what_fails_in_a_rank_is_told() -> None:
    with pytest.raises(AssertionError, match=r"rank 0:\n(.*\n)*ZeroDivisionError"):
        run_ranks(operator.truediv, 1, 1, 0)


def test_a_script_that_is_forked_has_streams_and_a_status() -> None:
    done = fork_script("train.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: train.py")
    done = fork_script("train.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("train.py: no configuration file given")
