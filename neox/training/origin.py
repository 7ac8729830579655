"""What a run starts from: fresh weights, the weights of any checkpoint, or a run that it goes on with."""

from dataclasses import dataclass
from pathlib import Path

import torch

from neox.checkpoint.lora import check_same_lora, merged
from neox.checkpoint.native.fallback import QUICK, Check, checkpoint_to_load
from neox.checkpoint.open import locate_checkpoint, open_checkpoint
from neox.checkpoint.runs import MASTER, RunReader, open_run
from neox.checkpoint.upstream.reader import Hints
from neox.checkpoint.weights import WeightReader, weight_source
from neox.config import Config
from neox.errors import CheckpointError
from neox.model.build import WeightSource, fresh_weights
from neox.model.lora import with_fresh_factors
from neox.training.optimizers.build import ADAMS


@dataclass(frozen=True)
class Origin:
    """A checkpoint and what is taken from it.

    Attributes:
        weights: the model.
        run: the same checkpoint where everything else is taken up too; None for weights only.
        remark: why weights only, where the configuration does not ask for that; else empty.
    """

    weights: WeightReader
    run: RunReader | None = None
    remark: str = ""


def origin_of(config: Config, check: Check = QUICK) -> Origin | None:
    """Open the checkpoint that a run starts from; None for fresh weights.

    Weights without a run around them (a folder of Hugging Face, GPT-NeoX's weights without optimizer, an import) can
    only mean a new run, so they need no `finetune: true`.

    Raises:
        CheckpointError: `load` cannot be used as asked.
    """
    folder = load_folder(config, check)
    if folder is None:
        return None
    if config.checkpoint.finetune:
        return Origin(merged(open_checkpoint(folder, hints=Hints.of(config.model))))
    with_optimizer = not config.checkpoint.no_load_optim
    run = open_run(folder, hints=Hints.of(config.model), with_optimizer=with_optimizer)
    if run is None:
        weights = open_checkpoint(folder, hints=Hints.of(config.model))
        return Origin(weights, remark=f"load {folder}: weights only, starting at iteration 0 with a fresh optimizer")
    check_same_lora(run, config.lora)
    if with_optimizer:
        _check_same_optimizer(run, config.optimizer.type)
    return Origin(run, run)


def _check_same_optimizer(run: RunReader, wanted: str) -> None:
    """See that the state in a checkpoint is of the optimizer that is to go on with it."""
    saved = run.manifest.optimizer
    if saved is None:
        raise CheckpointError(
            f"{run.folder}: has no optimizer state; set no_load_optim: true to start with a fresh one"
        )
    if saved != wanted and not {saved, wanted} <= set(ADAMS):
        raise CheckpointError(
            f"{run.folder}: was trained with optimizer {saved}, the configuration asks for {wanted}; "
            "set no_load_optim: true to start with a fresh one"
        )


def load_folder(config: Config, check: Check = QUICK) -> Path | None:
    """The checkpoint that `load` means; None where there is none yet and the run starts from scratch.

    As upstream: a folder without `latest` is not an error, unless `iteration` or `finetune` says that there must be
    something. That lets the same command start a run and take it up again. But a folder that holds other things, and is
    not the one this run saves to, is a mistyped one.

    Raises:
        CheckpointError: if there must be a checkpoint and is not, or `check` finds it damaged.
    """
    settings = config.checkpoint
    if settings.load is None:
        return None
    root = Path(settings.load)
    if root.exists() and not root.is_dir():
        raise CheckpointError(f"load {root}: a file; name the folder that the model or the checkpoints are in")
    folder = checkpoint_to_load(root, settings.iteration, fallback=settings.load_fallback, check=check)
    if folder is None and settings.finetune:
        if root.is_dir():
            return root
        raise CheckpointError(f"load {root}: no such folder, and finetune: true needs weights to start from")
    is_own = settings.save is not None and Path(settings.save).resolve() == root.resolve()
    if folder is None and not is_own and root.is_dir() and any(root.iterdir()):
        return locate_checkpoint(root)
    return folder


def weights_of(origin: Origin | None, config: Config) -> WeightSource:
    """What the model of a run is built from."""
    if origin is None:
        return fresh_weights(config)
    if origin.run is not None:
        return weight_source(_InPrecision(origin.run, config.model.precision))
    return with_fresh_factors(weight_source(origin.weights), seed=config.training.seed)


class _InPrecision:
    """A run's weights for a model in another precision: its fp32 masters, where it has them."""

    def __init__(self, run: RunReader, precision: str) -> None:
        self._run = run
        self._from_masters = run.manifest.precision != precision
        self.folder: Path = run.folder
        self.padded_vocab_size: int = run.padded_vocab_size

    def __contains__(self, name: str) -> bool:
        return name in self._run

    def names(self) -> list[str]:
        return self._run.names()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._run.shapes()

    def tensor(self, name: str) -> torch.Tensor:
        master = f"{name}/{MASTER}"
        return self._run.tensor(master if self._from_masters and master in self._run else name)
