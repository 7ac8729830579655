"""The optimizer over the parameters of this rank."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from neox.config import Config, OptimizerConfig
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh
from neox.training.optimizers.madgrad import MadgradW
from neox.training.optimizers.muon import Muon, is_matrix
from neox.training.optimizers.shares import Shard
from neox.training.optimizers.sm3 import SM3

Group = dict[str, Any]

ADAMS = ("adam", "adamw", "cpu_adam", "cpu_torch_adam", "adam8bit")
"""Types whose checkpoints hold the same state, so that a run can go on with another of them."""

_STATES = dict.fromkeys(ADAMS, ("exp_avg", "exp_avg_sq")) | {
    "lion": ("exp_avg",),
    "madgrad_wd": ("grad_sum", "grad_sum_sq", "start"),
    "muon": ("exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
    "sm3": ("momentum_buffer",),
}


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[Group]:
    """Matrices and embeddings decay; biases and the parameters of norms do not.

    With no decay there is one group, as upstream has it. Frozen parameters are in none.

    Args:
        parameters: canonical names with parameters.
        weight_decay: coefficient of the decayed group.
    """
    named = [(name, p) for name, p in parameters if p.requires_grad]
    if weight_decay == 0.0:
        return [{"params": [p for _, p in named], "weight_decay": 0.0, "name": "no_weight_decay_params"}]
    decayed = [p for name, p in named if decays(name)]
    others = [p for name, p in named if not decays(name)]
    groups: list[Group] = [
        {"params": decayed, "weight_decay": weight_decay, "name": "weight_decay_params"},
        {"params": others, "weight_decay": 0.0, "name": "no_weight_decay_params"},
    ]
    return [group for group in groups if group["params"]]  # DeepSpeed cannot flatten an empty one


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter of this canonical name."""
    module, kind = name.split(".")[-2:]
    return kind != "bias" and "norm" not in module


def state_names(settings: OptimizerConfig, name: str = "", *, is_orthogonal: bool = False) -> tuple[str, ...]:
    """What the optimizer keeps for each element of a parameter, from its first step on.

    Args:
        settings: of the optimizer.
        name: canonical name of the parameter; empty where `is_orthogonal` says it.
        is_orthogonal: whether Muon updates it.
    """
    if settings.type in ("sgd", "sm3") and not settings.params["momentum"]:
        return ()
    if settings.type == "muon" and (is_orthogonal or (name and is_matrix(name))):
        return ("momentum_buffer",)
    return _STATES[settings.type]


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: Config, mesh: Mesh | None = None
) -> Optimizer:
    """Make what `optimizer.type` names.

    AdamW (Loshchilov & Hutter 2019; upstream's `Adam` is this too, and the ones for the CPU are) and SGD are torch's,
    Lion (Chen et al. 2023) is pytorch-optimizer's, Adam with 8-bit moments (Dettmers et al. 2022) is bitsandbytes';
    MADGRAD, SM3 and Muon are ours. DeepSpeed hands the optimizer fp32 master weights where the model is in half
    precision.

    Args:
        parameters: canonical names with the parameters of this rank.
        config: the run.
        mesh: the process grid, for those optimizers that need whole matrices; None for one process.

    Raises:
        ConfigError: a library that the type needs is not installed.
    """
    settings, named = config.optimizer, [(name, p) for name, p in parameters if p.requires_grad]
    if settings.type == "muon":
        return _build_muon(named, config, mesh or Mesh())
    groups = parameter_groups(named, settings.weight_decay)
    if settings.type == "sm3":
        return SM3(_with_shards(groups), lr=settings.lr, mesh=mesh or Mesh(), **settings.params)
    if settings.type == "adam8bit" and mesh is not None and mesh.tensor_size > 1:
        groups = _divided_apart(groups)
    return _elementwise(settings, groups)


def _elementwise(settings: OptimizerConfig, groups: list[Group]) -> Optimizer:
    """One of those that treat every element alone."""
    lr, params = settings.lr, settings.params
    match settings.type:
        case "madgrad_wd":
            return MadgradW(groups, lr=lr, **params)
        case "sgd":
            return SGD(groups, lr=lr, **params)
        case "lion":
            lion: type[Optimizer] = _library("pytorch_optimizer", settings.type).Lion
            return lion(groups, lr=lr, betas=tuple(params["betas"]))  # type: ignore[call-arg]
        case "adam8bit":
            _library("bitsandbytes", settings.type)
            from neox.training.optimizers.adam8bit import Adam8bit

            return Adam8bit(groups, lr=lr, **params)
    options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8} | params
    return AdamW(groups, lr=lr, fused=True, **options)


def _build_muon(named: list[tuple[str, nn.Parameter]], config: Config, mesh: Mesh) -> Muon:
    settings = config.optimizer
    matrices = [p for name, p in named if is_matrix(name)]
    rest = parameter_groups([(name, p) for name, p in named if not is_matrix(name)], settings.weight_decay)
    groups = [group | {"orthogonal": False} for group in rest if group["params"]]
    if matrices:
        first = {"params": matrices, "weight_decay": settings.weight_decay, "name": "muon_params", "orthogonal": True}
        groups = [*_with_shards([first]), *groups]
    return Muon(groups, lr=settings.lr, mesh=mesh, model=config.model, **({"adamw_lr": None} | settings.params))


def _divided_apart(groups: list[Group]) -> list[Group]:
    """Each group as two: what tensor ranks hold parts of, and what all of them hold.

    A block of 8-bit moments has one scale. Above ZeRO 0 a group is flattened, and a block that held the end of one
    parameter and the beginning of the next would give a replicated one other moments on each tensor rank.
    """
    apart = []
    for group in groups:
        for is_divided in (True, False):
            held = [p for p in group["params"] if p.tensor_model_parallel is is_divided]
            apart.append(group | {"params": held})
    return [group for group in apart if group["params"]]


def _with_shards(groups: list[Group]) -> list[Group]:
    return [group | {"shards": [Shard.of(p) for p in group["params"]]} for group in groups]


def _library(name: str, kind: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ConfigError(f"optimizer.type: {kind} needs {package}; pip install {package}") from error
