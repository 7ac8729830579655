"""A cut wire between two hosts: each side names the other, and ends."""

import sys

from hosts import Cluster, wait_until
from tiny_run import Training, losses

TIMEOUT = 15
"""Seconds; the two must also meet in them."""


def test_a_cut_link(two: Cluster, training: Training) -> None:
    save = two.folder / "cut"
    settings = [
        "train_iters=1000000",
        "lr_decay_iters=10",
        f"distributed_timeout={TIMEOUT}",
        "checkpoint_factor=1000000",
    ]
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29650"}
    ranks = [
        two.start(host, sys.executable, *training.script(save, *settings), RANK=str(rank), **place)
        for rank, host in enumerate(("n1", "n2"))
    ]
    try:
        wait_until(lambda: (save / "metrics.jsonl").is_file() and len(losses(save)) > 3, "the first steps", 120)
        two.set_link("n2", "down")
        outs = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        two.set_link("n2", "up")
    assert [rank.returncode for rank in ranks] == [3, 3], "\n".join(outs)
    assert "rank 1 (host n2, process " in outs[0]
    assert "has not answered for 15." in outs[0]
    assert "rank 0: step " in outs[0]
    assert "rank 1 (host n2, process " in outs[1]
    assert "rank 0 has not answered for 15." in outs[1]
    for out in outs:
        # A step meets the other rank in its gradients, its guards and its votes: the link is cut in any of them.
        assert "neox/training/loop.py:" in out
        assert "Traceback" not in out
