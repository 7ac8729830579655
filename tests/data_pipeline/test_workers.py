"""Processes that read ahead: they end with their rank, however it ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import wait_until_gone

RANK = """
import multiprocessing
import os
import sys
from functools import partial

from torch.utils.data import DataLoader

from neox.data.workers import serve

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    loader = iter(DataLoader(range(10), num_workers=1, worker_init_fn=partial(serve, os.getpid())))
    next(loader)
    print(loader._workers[0].pid, flush=True)
    os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_worker_ends_when_its_rank_is_killed(tmp_path: Path, start_method: str) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    words = [sys.executable, str(script), start_method, str(int(signal.SIGKILL))]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    worker = int(done.stdout.readline())
    done.wait()
    wait_until_gone([worker], 60)
