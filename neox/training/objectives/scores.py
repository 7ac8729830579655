"""Log-probabilities that a model gives the scored tokens of a micro-batch, and the frozen reference's beside them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from neox.config import Config, LoraConfig, PreferenceConfig
from neox.model.build import WeightSource, layer_builder
from neox.model.layers import Decoder, layer_list
from neox.model.loss import Labels
from neox.parallel.mesh import Mesh
from neox.training.batches import ModelInputs
from neox.training.objectives.objective import Model


def scored(inputs: ModelInputs) -> torch.Tensor:
    """1 where a token counts, fp32 [B, S]."""
    return (inputs.targets.weights_BS > 0).float()


def token_scores(model: Model, inputs: ModelInputs, *, in_fp32: bool, dtype: torch.dtype) -> torch.Tensor:
    """Log-probability of each next token, fp32 [B, S], 0 where it does not count.

    Args:
        model: the trained model or the reference.
        inputs: the micro-batch.
        in_fp32: keep them as they are computed; else round them to `dtype`.
        dtype: of the model.
    """
    scores_BS = model(inputs.tokens_BS, Labels(inputs.targets.labels_BS), inputs.context)
    return (scores_BS if in_fp32 else scores_BS.to(dtype).float()) * scored(inputs)


def token_mean(values_BS: torch.Tensor, inputs: ModelInputs) -> torch.Tensor:
    """Share of a micro-batch in the mean over the scored tokens of the step.

    The weights carry the step's number of tokens, so the mean over micro-batches and ranks, as `mean_figures` takes it,
    is the mean over tokens, however many of them each has.

    Args:
        values_BS: of each next token.
        inputs: the micro-batch.
    """
    return (values_BS.detach() * inputs.targets.weights_BS).sum()


class Reference:
    """A frozen copy of a model, whole on each tensor-parallel group, or the log-probabilities it has left on disk.

    Args:
        model: None where micro-batches bring the log-probabilities along.
    """

    def __init__(self, model: Decoder | None) -> None:
        self.model = model

    @classmethod
    def build(cls, config: Config, mesh: Mesh, source: WeightSource) -> "Reference":
        """Make this rank's share of the model, without what LoRA would add to it."""
        build = layer_builder(config.model_copy(update={"lora": LoraConfig()}), mesh, source)
        model = Decoder(config.model, layers=[build(spec) for spec in layer_list(config.model)])
        return cls(model.requires_grad_(False).eval())

    @torch.no_grad()
    def token_scores(self, inputs: ModelInputs, *, in_fp32: bool, dtype: torch.dtype) -> torch.Tensor:
        """See `token_scores`."""
        if self.model is not None:
            return token_scores(self.model, inputs, in_fp32=in_fp32, dtype=dtype)
        return inputs.extras["reference"] * scored(inputs)


@dataclass
class WithReference:
    """What objectives that compare with a reference are made of.

    Attributes:
        settings: the objective's keys.
        dtype: of the model.
        reference: the frozen model, or what it has left on disk; None where the objective runs without.
        recorded: see Objective.
    """

    settings: PreferenceConfig
    dtype: torch.dtype
    reference: Reference | None
    recorded: Mapping[str, str]
