"""Steps and evaluations without a labelled token have no loss, and take no part in a mean."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts_of import fork_script
from training.layouts import MODEL, SGD, TRAINING, VOCABULARY

from neox.data import IndexedDatasetWriter

STEPS, LENGTH, REPORT = 20, 8, 10
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "pp2": (2, {"pipe_parallel_size": 2, "gradient_accumulation_steps": 2}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Training data of which two thirds have no label, and held-out data without any."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.RandomState(1)
    found: dict[str, Any] = {}
    for split, labelled in (("train", 1 / 3), ("valid", 0.0), ("test", 0.0)):
        with (
            IndexedDatasetWriter(folder / split, np.int32) as tokens,
            IndexedDatasetWriter(folder / f"{split}_labels", np.int32) as labels,
        ):
            for _ in range(30):
                ids = rng.randint(0, VOCABULARY, 4 * LENGTH)
                tokens.add_document(ids)
                labels.add_document(ids if rng.rand() < labelled else np.full_like(ids, -100))
        found |= {f"{split}_data_paths": [str(folder / split)]}
        found |= {f"{split}_label_data_paths": [str(folder / f"{split}_labels")]}
    return found


def train(folder: Path, data: dict[str, Any], layout: str, log_interval: int) -> tuple[list[dict[str, Any]], str]:
    """The records of a run, and what it said."""
    world_size, changes = LAYOUTS[layout]
    flat = MODEL | TRAINING | SGD | data | changes
    flat |= {"seq_length": LENGTH, "train_batch_size": 2, "train_iters": STEPS, "log_interval": log_interval}
    flat |= {"eval_iters": 2, "eval_interval": REPORT}
    (folder / "run.yml").write_text(json.dumps(flat))
    ended = fork_script("train.py", "run.yml", ranks=world_size if world_size > 1 else 0, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return records, ended.stderr


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> dict[int, float]:
    """The loss of each step that has one."""
    records, _ = train(tmp_path_factory.mktemp("every_step"), data, "one", 1)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    found = {record["step"]: record["train/lm_loss"] for record in records if "train/lm_loss" in record}
    assert 2 <= len(found) <= STEPS - 2
    assert min(found.values()) > 1.0
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_means_leave_out_what_has_no_label(
    tmp_path: Path, data: dict[str, Any], losses: dict[int, float], layout: str
) -> None:
    records, said = train(tmp_path, data, layout, REPORT)
    for record, first in zip(records, range(1, STEPS, REPORT), strict=True):
        expected = [loss for step, loss in losses.items() if first <= step < first + REPORT]
        assert record["train/lm_loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert said.count("no labelled token in ") == 1
    for evaluation in ("validation at iteration 10", "validation at iteration 20", "test at iteration 20"):
        assert said.count(f"{evaluation}: no labelled token, so there is no loss") == 1
    assert not any(name.startswith(("validation/", "test/")) for record in records for name in record)
