"""train.py in whose ranks two things go wrong when a test says so: a batch that gives NaN, and a bit that flips.

Beside the configuration lies a folder `faults`. `poison.json` there lists places of the order of samples; the batch
that holds one gives NaN whenever it is read. `flip.json` names a rank and a seed; that rank flips one bit of one of its
parameters before its next step, once, and renames the file. Steps are slowed down, so that a test can keep up.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
SECONDS_OF_A_STEP = 0.05
"""Added to each."""


def flip_one_bit(folder: Path, engine: Any) -> None:
    """Flip a bit of the upper half of a mantissa, if this rank is to."""
    order = folder / "flip.json"
    if not order.exists() or json.loads(order.read_text())["rank"] != engine.mesh.rank:
        return
    choice = random.Random(json.loads(order.read_text())["seed"])
    _, parameter = choice.choice(sorted(engine.parameters().items()))
    bits = parameter.data.view(-1).view(torch.int32)
    position = choice.randrange(bits.numel())
    bits[position] ^= 1 << choice.randrange(12, 23)
    order.rename(order.with_suffix(".done"))


def poison_batch(folder: Path, progress: Any, batch: Any, rank: int) -> None:
    """Make a batch give NaN that holds a poisoned sample."""
    from neox.data.order import advance

    end = advance(progress.consumed_samples, batch.samples, progress.left_out)
    for place in json.loads((folder / "poison.json").read_text()):
        is_left_out = any(start <= place < stop for start, stop in progress.left_out)
        if progress.consumed_samples <= place < end and not is_left_out:
            batch.micro_batches[-1].targets.weights_BS.mul_(float("nan"))
            if rank == 0:
                (folder / f"poison-{place}.done").touch()


def install(folder: Path) -> None:
    """Put both into the engine and the maker of batches."""
    from neox.training.batches import BatchMaker
    from neox.training.plain import PlainEngine

    make, train = BatchMaker.for_step, PlainEngine.train_step

    def for_step(maker: Any, loader: Any, progress: Any) -> Any:
        batch = make(maker, loader, progress)
        poison_batch(folder, progress, batch, maker.mesh.rank)
        return batch

    def train_step(engine: Any, batch: Any) -> Any:
        flip_one_bit(folder, engine)
        time.sleep(SECONDS_OF_A_STEP)
        return train(engine, batch)

    BatchMaker.for_step, PlainEngine.train_step = for_step, train_step  # type: ignore[method-assign]


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        install(Path(sys.argv[1]).parent / "faults")
    sys.path.insert(0, str(ROOT))
    import train
    from neox.launch.main import leave, script_main

    leave(script_main(train.main))  # which starts ranks as sys.argv[0], so as this file
