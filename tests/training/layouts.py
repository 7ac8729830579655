"""Runs of the trainer at a layout, for comparison with one process."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import documents as corpus_documents
from ranks import run_ranks

from neox.config import config_from_dict
from neox.data import build_datasets
from neox.parallel.mesh import build_mesh
from neox.parallel.rng import seed_dropout
from neox.training.engine import Engine
from neox.training.loop import Run, Step, training_loop
from neox.training.run import batch_maker, start_or_resume, train_loader
from neox.training.state import owned_tensors

VOCABULARY = 131
"""ASCII and three more: no multiple of 2, so every division of it is uneven."""

MODEL = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "pos_emb": "rotary",
    "rotary_pct": 0.25,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "padded_vocab_size": VOCABULARY,
}

# At three times this rate the steps overshoot, and rounding grows a hundredfold in 20 of them.
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}}, "gradient_clipping": 0.5}
EPS = 1e-5
"""Of Adam, far above the rounding of a gradient (1e-9 to 1e-8 here).

At the usual 1e-8 a gradient of the size of its rounding, such as that of a key's bias or of a rare token, is divided by
itself: the weight moves by up to the learning rate in a direction that depends on the processor.
"""
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "eps": EPS}}, "gradient_clipping": 0.5}

TRAINING = {
    "train_batch_size": 16,
    "train_iters": 20,
    "lr_decay_style": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.1,
    "eval_iters": 0,
    "num_workers": 0,
    "precision": "fp32",
    "log_interval": 100,
}


def saved_run(save: Path, corpus: str, **changes: Any) -> dict[str, Any]:
    """A run with dropout that is saved, and logs every step."""
    run = {"data_path": corpus, "save": str(save), "hidden_dropout": 0.1, "log_interval": 1}
    return MODEL | TRAINING | ADAMW | run | changes


def write_corpus(prefix: Path, *, documents: int = 60, first: int = 0) -> str:
    """Tokenize documents of the tests' corpus by ASCII code into `<prefix>.bin/.idx`."""
    from neox.data import IndexedDatasetWriter

    texts = corpus_documents()[first : first + documents]
    assert len(texts) == documents
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for text in texts:
            writer.add_document(np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.uint16))
    return str(prefix)


@dataclasses.dataclass
class Curve:
    """What a run left behind; weights are whole tensors, from whichever rank owned them."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    skipped: list[bool]
    scales: list[float | None]
    weights: dict[str, np.ndarray]


class Recorder:
    """A callback that keeps every step's figures."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.steps: list[Step] = []
        self.scales: list[float | None] = []

    def before_training(self, progress: Any) -> None:
        pass

    def after_step(self, step: Step) -> None:
        self.steps.append(dataclasses.replace(step, loss=step.loss.clone()))
        self.scales.append(self.engine.loss_scale)


def run_layout(flat: dict[str, Any], world_size: int) -> Curve:
    """Train on this rank; the weights returned are the tensors this rank owns."""
    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    if config.model.precision == "fp16":
        allow_fp16_on_cpu()
    mesh = build_mesh(config)
    seed_dropout(config.training.seed, mesh)
    engine, progress, schedule = start_or_resume(config, mesh)
    data = build_datasets(config)
    loader = train_loader(config, mesh, data, progress.consumed_samples)
    recorder = Recorder(engine)
    run = Run(engine, loader, batch_maker(config, mesh), schedule, config.training.train_iters)
    training_loop(run, progress, [recorder])
    steps = recorder.steps
    return Curve(
        losses=[float(s.loss) for s in steps],
        norms=[float(s.gradient_norm) for s in steps],
        rates=[s.learning_rate for s in steps],
        skipped=[s.skipped for s in steps],
        scales=recorder.scales,
        weights={t.key: t.value.float().numpy() for t in owned_tensors(engine, with_optimizer=False)},
    )


def curve_of(flat: dict[str, Any], world_size: int) -> Curve:
    """Train on `world_size` new processes."""
    return join(run_ranks(run_layout, world_size, flat, world_size))


def join(curves: list[Curve]) -> Curve:
    """One curve of all ranks': figures of rank 0, weights of whoever owned them."""
    weights: dict[str, np.ndarray] = {}
    for curve in curves:
        weights |= curve.weights
    return dataclasses.replace(curves[0], weights=weights)


def allow_fp16_on_cpu() -> None:
    """DeepSpeed's CPU accelerator refuses fp16; the arithmetic works all the same."""
    import deepspeed

    deepspeed.get_accelerator().is_fp16_supported = lambda: True
