"""The optimizer over the parameters of this rank."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from neox.config import Config

Group = dict[str, object]


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Matrices and embeddings decay; biases and the parameters of norms do not.

    With no decay there is one group, as upstream has it.

    Args:
        parameters: canonical names with parameters.
        weight_decay: coefficient of the decayed group.
    """
    named = list(parameters)
    if weight_decay == 0.0:
        return [{"params": [p for _, p in named], "weight_decay": 0.0, "name": "no_weight_decay_params"}]
    decayed = [p for name, p in named if decays(name)]
    others = [p for name, p in named if not decays(name)]
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "weight_decay_params"},
        {"params": others, "weight_decay": 0.0, "name": "no_weight_decay_params"},
    ]


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter of this canonical name."""
    module, kind = name.split(".")[-2:]
    return kind != "bias" and "norm" not in module


def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]], config: Config) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019; upstream's `Adam` is this too) or SGD, from torch.

    DeepSpeed hands it the fp32 master weights where the model is in half precision.
    """
    settings = config.optimizer
    groups = parameter_groups(parameters, settings.weight_decay)
    if settings.type == "sgd":
        return SGD(groups, lr=settings.lr, **settings.params)
    options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8} | settings.params
    return AdamW(groups, lr=settings.lr, fused=True, **options)
