"""A corpus that is lost under a run: one line, a status that a launcher may answer, and the last checkpoint whole."""

import json
import os
import threading
from pathlib import Path

from scripts_of import fork_script
from training.layouts import ADAMW, MODEL, TRAINING, write_corpus

from neox.checkpoint.native.integrity import damages


def test_data_that_vanish_in_the_middle(tmp_path: Path) -> None:
    save, corpus = tmp_path / "run", write_corpus(tmp_path / "corpus_text_document")
    flat = {"data_path": corpus, "save": str(save), "checkpoint_factor": 2, "train_iters": 100_000, "log_interval": 1}
    flat |= {"num_workers": 1, "io_retry_time": 1}
    (tmp_path / "model.yml").write_text(json.dumps(MODEL | TRAINING | ADAMW | flat))
    over = threading.Event()

    def lose() -> None:
        while not (save / "latest").exists() and not over.wait(0.02):
            continue
        os.truncate(f"{corpus}.bin", 100)

    loss = threading.Thread(target=lose)
    loss.start()
    try:
        done = fork_script("train.py", tmp_path / "model.yml", ranks=2)
    finally:
        over.set()
        loss.join()
    assert done.returncode in (1, 3), done.stderr  # 3: a rank that was told that the other had failed
    assert f"{corpus}.bin: cannot be read by rank " in done.stderr
    assert ", trying again for 1 s" in done.stderr
    assert "it has 100 bytes, and had " in done.stderr
    assert "Traceback" not in done.stderr
    newest = save / (save / "latest").read_text()
    assert damages(newest) == []
    logs = "".join(path.read_text() for path in (save / "logs" / "ranks").glob("rank-*.log"))
    assert "bring the file back and start again from the checkpoint" in logs
