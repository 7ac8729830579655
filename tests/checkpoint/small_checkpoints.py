"""Native checkpoints of a few kilobytes, two files a rank."""

from collections.abc import Iterator
from pathlib import Path

import torch

from neox.checkpoint.native.lineage import Lineage
from neox.checkpoint.native.manifest import Layout, Manifest, Progress
from neox.checkpoint.native.store import StoredTensor, Team, write_checkpoint


def names_of(rank: int) -> list[str]:
    return [f"layers.{10 * rank + index}.mlp.linear1.bias" for index in (2, 3, 4)]


NAMES = names_of(0)
ALONE = Team()
RUN = Lineage("a-run")
"""That writes them."""


def manifest_of(iteration: int, lineage: Lineage = RUN) -> Manifest:
    return Manifest(
        progress=Progress(iteration=iteration, consumed_samples=8 * iteration),
        layout=Layout(1, 1, 1, 0),
        padded_vocab_size=131,
        precision="fp32",
        schedule={"max_lr": 0.001},
        optimizer="adam",
        config={"num_layers": 2, "schedule": (1, 2.5), "by_number": {7: None}},
        files={},
        tensors={},
        run=lineage.run,
        lineage=list(lineage.parents),
    )


def stored(iteration: int, rank: int = 0, *, numbers: int = 6) -> Iterator[StoredTensor]:
    """What a rank writes at an iteration, other values for each."""
    for name in names_of(rank):
        generator = torch.Generator().manual_seed(1000 * iteration + rank)
        yield StoredTensor("model", name, torch.randn(numbers, generator=generator).bfloat16())
        yield StoredTensor("optimizer", f"{name}/exp_avg", torch.randn(2, numbers, generator=generator))


def contents(root: Path) -> dict[str, bytes]:
    """Every byte of a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def save(root: Path, iteration: int, *, lineage: Lineage = RUN, team: Team = ALONE, numbers: int = 6) -> Path:
    return write_checkpoint(
        root,
        iteration=iteration,
        tensors=stored(iteration, team.rank, numbers=numbers),
        manifest=manifest_of(iteration, lineage),
        configs={"a/model.yml": "num_layers: 2\n"},
        team=team,
    )
