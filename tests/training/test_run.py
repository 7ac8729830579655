"""A run that trains nothing says so."""

import json
from pathlib import Path
from typing import Any

import pytest
from scripts_of import fork_script
from training.layouts import MODEL, SGD, TRAINING, write_corpus

from neox.config import config_from_dict
from neox.training.run import idle_remark


@pytest.mark.parametrize(
    ("changes", "start", "line"),
    [
        ({"train_iters": 10}, 9, ""),
        ({"train_iters": 10}, 10, "nothing to train: the run is at iteration 10, and train_iters is 10"),
        ({"train_iters": 5}, 10, "nothing to train: the run is at iteration 10, and train_iters is 5"),
        ({"train_iters": 0}, 0, "nothing to train: the run is at iteration 0, and train_iters is 0"),
        ({"do_train": False}, 3, "nothing to train: do_train is false; the run is at iteration 3"),
    ],
)
def test_why_no_step_is_trained(changes: dict[str, Any], start: int, line: str) -> None:
    assert idle_remark(config_from_dict(MODEL | TRAINING | SGD | changes), start) == line


def test_a_script_that_trains_nothing_says_so_and_succeeds(tmp_path: Path) -> None:
    flat = MODEL | TRAINING | SGD | {"data_path": write_corpus(tmp_path / "corpus"), "train_iters": 0}
    (tmp_path / "run.yml").write_text(json.dumps(flat))
    ended = fork_script("train.py", "run.yml", cwd=tmp_path)
    assert ended.returncode == 0
    assert "nothing to train: the run is at iteration 0, and train_iters is 0\n" in ended.stderr
