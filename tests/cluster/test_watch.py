"""A cut wire between two hosts: each side names the other, and ends."""

import re
import sys

from hosts import Cluster, wait_until
from tiny_run import Training, losses

TIMEOUT = 20
"""Seconds; the two must also meet in them."""


def test_a_cut_link(two: Cluster, training: Training) -> None:
    save = two.folder / "cut"
    settings = [
        "train_iters=500",
        f"distributed_timeout={TIMEOUT}",
        "checkpoint_factor=1000",
    ]
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29650"}
    words = [sys.executable, *training.held_script(save, *settings)]

    def has_begun() -> bool:
        steps = losses(save) if (save / "metrics.jsonl").is_file() else []
        return len(steps) > 3 or any(rank.poll() is not None for rank in ranks)

    try:
        with training.held():
            ranks = [two.start(host, *words, RANK=str(rank), **place) for rank, host in enumerate(("n1", "n2"))]
            wait_until(has_begun, "the first steps", 600)
            two.set_link("n2", "down")
            outs = [rank.communicate(timeout=600)[0] for rank in ranks]
    finally:
        two.set_link("n2", "up")
    assert [rank.returncode for rank in ranks] == [3, 3], "\n".join(outs)
    assert re.search(r"rank 1 \(host n2, process \d+\) (has not answered for|does not answer)", outs[0])
    assert "rank 0: step " in outs[0]
    assert "rank 1 (host n2, process " in outs[1]
    assert re.search(r"rank 0 has not answered for \d+\.\d s: its link is cut", outs[1])
    for out in outs:
        # A step meets the other rank in its gradients, its guards and its votes: the link is cut in any of them.
        assert "neox/training/loop.py:" in out
        assert "Traceback" not in out
