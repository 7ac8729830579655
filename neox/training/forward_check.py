"""A forward pass on fixed sequences: the losses that a checkpoint keeps tell whether it is loaded as the same model."""

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch

from neox.checkpoint.runs import RunReader
from neox.errors import CheckpointError
from neox.training.batches import GlobalBatch, ModelInputs, global_batch, micro_batch
from neox.training.engine import Engine
from neox.training.objectives.objective import Figures, Model
from neox.training.team import tell

_SEQUENCES = 4
_SEED = 20210
TOLERANCES: MappingProxyType[str, float] = MappingProxyType({"fp32": 1e-4, "fp16": 5e-3, "bfloat16": 2e-2})
"""How far two losses of the same weights may lie apart, by precision: other layouts and devices round otherwise."""


def forward_losses(engine: Engine) -> list[float]:
    """Mean loss of each fixed sequence, nats per token; nothing where no such check is asked for.

    A collective over all ranks. The sequences are the same at every layout and batch size; dropout is off.
    """
    if not engine.config.checkpoint.checkpoint_validation_with_forward_pass:
        return []
    objective, figures = engine.objective, engine.figures
    engine.objective = _Probe(is_reward_model=engine.config.model.has_reward_head)
    try:
        return [float(engine.evaluate(batch)) for batch in _fixed_batches(engine)]
    finally:
        engine.objective, engine.figures = objective, figures


def check_forward(engine: Engine, reader: RunReader) -> None:
    """Compare the losses of a model just loaded with those that its checkpoint was saved with.

    A collective over all ranks. A checkpoint that has none is not compared, nor one of another `seq_length`, whose
    sequences were others; a line says so.

    Raises:
        CheckpointError: they differ by more than rounding.
    """
    saved, length = reader.manifest.forward_losses, engine.config.model.seq_length
    before = reader.manifest.config.get("seq_length", length)
    if not saved or before != length:
        if engine.config.checkpoint.checkpoint_validation_with_forward_pass:
            why = f"its sequences have {before} tokens, and seq_length is {length}" if saved else "it was saved without"
            tell(engine.mesh, f"checkpoint_validation_with_forward_pass: {reader.folder} is not compared: {why}")
        return
    found, precisions = forward_losses(engine), (engine.config.model.precision, reader.manifest.precision)
    tolerance = max(TOLERANCES[precision] for precision in precisions)
    for number, (ours, theirs) in enumerate(zip(found, saved, strict=False)):
        same = math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance)
        if not same and not (math.isnan(ours) and math.isnan(theirs)):
            raise CheckpointError(
                f"{reader.folder}: checkpoint_validation_with_forward_pass: the loaded model gives test sequence "
                f"{number} a loss of {ours:.6f}, the saved one gave {theirs:.6f}; check the files with "
                "tools/ckpts/verify_checkpoint.py, and the keys of the model"
            )


class _Probe:
    """The loss of the next token whatever the run minimises; of a reward model the mean reward."""

    recorded: Mapping[str, str] = MappingProxyType({})

    def __init__(self, *, is_reward_model: bool) -> None:
        self.is_reward_model = is_reward_model

    def __call__(self, model: Model, inputs: ModelInputs) -> tuple[torch.Tensor, Figures]:
        """See Objective."""
        if self.is_reward_model:
            return model(inputs.tokens_BS, None, inputs.context).float().mean(), {}
        return model(inputs.tokens_BS, inputs.targets, inputs.context), {}


def _fixed_batches(engine: Engine) -> Iterator[GlobalBatch]:
    """A batch for each sequence, which is repeated for as many rows as the run's micro-batches have."""
    config, mesh = engine.config, engine.mesh
    assert config.model.padded_vocab_size is not None, "the vocabulary was resolved before the model was built"
    generator = torch.Generator().manual_seed(_SEED)
    shape = (_SEQUENCES, config.model.seq_length + 1)
    sequences = torch.randint(config.model.padded_vocab_size, shape, generator=generator)
    rows = config.batch.train_micro_batch_size_per_gpu
    for sequence in sequences:
        item = {"tokens": sequence.expand(rows, -1)}
        if config.data.document_masking:  # then the stages of a pipeline pass documents on: here the row is one
            item["documents"] = torch.zeros_like(item["tokens"])
        yield global_batch([micro_batch(item, device=mesh.device, mask_after=None)], mesh)
