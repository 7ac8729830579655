"""Runs whose rows hold several documents, and whose lengths and batches grow; and the same written out by hand."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import documents
from training.layouts import MODEL, SGD, TRAINING, Recorder

from neox.config import Config, config_from_dict
from neox.data import IndexedDatasetWriter, build_datasets
from neox.model.build import build_decoder, fresh_weights
from neox.parallel.mesh import build_mesh
from neox.parallel.rng import seed_dropout
from neox.training.batches import document_context
from neox.training.callbacks import Checkpoints
from neox.training.loop import Run, training_loop
from neox.training.run import batch_maker, start_or_resume, train_loader
from neox.training.schedule import LRSchedule

END = 0
"""The end-of-document token of the character-level tokenizer."""

RAMP = {"train_micro_batch_size_per_gpu": 2, "rampup_batch_size": [4, 4, 24]}
SIZES = [4, 4, 8, 12, 16, 16]
"""Of RAMP with a full batch of 16: consumed before each step are 0, 4, 8, 16, 28 and 44 of 24 samples."""

CURRICULUM = {
    "curriculum_learning": {
        "enabled": True,
        "curriculum_type": "seqlen",
        "min_difficulty": 8,
        "max_difficulty": 32,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 5, "difficulty_step": 4},
    }
}
LENGTHS = [12, 16, 20, 24, 32, 32]
"""Of CURRICULUM: 8 + 24 s / 5 at steps 1 to 6 is 12.8, 17.6, 22.4, 27.2, 32 and 36.8."""


def write_documents(prefix: Path) -> str:
    """Pieces of the tests' corpus by ASCII code, each with its end-of-document token."""
    random = np.random.RandomState(3)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for text in documents()[:60]:
            ids = np.frombuffer(text[:400].encode("ascii"), dtype=np.uint8).astype(np.uint16)
            for piece in np.split(ids, np.sort(random.randint(0, len(ids), 20))):
                if len(piece):
                    writer.add_document(np.append(piece, END).astype(np.uint16))
    return str(prefix)


def settings(path: str, **changes: Any) -> dict[str, Any]:
    """A run of six steps over rows of short documents."""
    tokenizer = {"tokenizer_type": "CharLevelTokenizer", "document_masking": True, "eod_mask_loss": True}
    return MODEL | TRAINING | SGD | tokenizer | {"data_path": path, "train_iters": 6} | changes


@dataclasses.dataclass
class Figures:
    """What a run left behind, by step."""

    losses: list[float]
    sizes: list[int]
    lengths: list[int]
    validation: float


def run(flat: dict[str, Any], world_size: int) -> Figures:
    """Train on this rank from the beginning or a checkpoint; evaluate full rows before and after, and save when due."""
    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    mesh = build_mesh(config)
    seed_dropout(config.training.seed, mesh)
    engine, progress, schedule = start_or_resume(config, mesh)
    data = build_datasets(config)
    batches, recorder = batch_maker(config, mesh), Recorder(engine)
    held_out = batches.next(train_loader(config, mesh, data, 100))
    engine.evaluate(held_out)
    loader = train_loader(config, mesh, data, progress.consumed_samples)
    last = config.training.train_iters
    checkpoints = Checkpoints(engine, schedule, last_iteration=last)
    training_loop(Run(engine, loader, batches, schedule, last), progress, [recorder, checkpoints])
    steps = recorder.steps
    return Figures(
        losses=[float(s.loss) for s in steps],
        sizes=[s.samples for s in steps],
        lengths=[s.length for s in steps],
        validation=float(engine.evaluate(held_out)),
    )


def by_hand(flat: dict[str, Any], sizes: list[int], lengths: list[int]) -> list[float]:
    """The losses of the same run in plain torch, one document at a time: sizes and lengths are given."""
    return _by_hand(json.dumps(flat), tuple(sizes), tuple(lengths))


@cache
def _by_hand(flat: str, sizes: tuple[int, ...], lengths: tuple[int, ...]) -> list[float]:
    config = config_from_dict(json.loads(flat))
    model = build_decoder(config.model, source=fresh_weights(config))
    optimizer = _sgd(model, config)
    schedule, data = LRSchedule.from_config(config), build_datasets(config)
    assert data.train is not None
    losses, consumed = [], 0
    for step, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        rows = [torch.as_tensor(data.train[i]["tokens"])[: length + 1] for i in range(consumed, consumed + size)]
        consumed += size
        total, count = torch.zeros(()), 0
        for row in rows:
            loss, number = _loss_of_row(model, row)
            total, count = total + loss, count + number
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        optimizer.step()
        losses.append(float(total.detach() / count))
    return losses


def _loss_of_row(model: torch.nn.Module, row: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Sum of the losses of one row, each of its documents run alone, and the number of predictions that count."""
    total, count, start = torch.zeros(()), 0, 0
    inputs = row[:-1]
    ends = [i + 1 for i in range(len(inputs)) if inputs[i] == END]
    for end in sorted({*ends, len(inputs)}):
        logits, labels = model(inputs[None, start:end])[0], row[start + 1 : end + 1].clone()
        if inputs[end - 1] == END:
            labels[-1] = -100
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        count += int((labels >= 0).sum())
        start = end
    return total, count


def _sgd(model: torch.nn.Module, config: Config) -> torch.optim.SGD:
    decayed = [p for name, p in model.named_parameters() if p.dim() > 1]
    others = [p for name, p in model.named_parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others}]
    return torch.optim.SGD(groups, lr=0.0, momentum=config.optimizer.params["momentum"])


def packed_row(tokens_BS: torch.Tensor) -> Any:
    """The context of packed rows whose documents end with END."""
    ends_BS = tokens_BS == END
    return document_context(ends_BS.cumsum(1) - ends_BS.long())
