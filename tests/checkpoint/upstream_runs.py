"""Checkpoints that DeepSpeed itself writes of models with GPT-NeoX's names, and the state they were written from."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from golden_models import BASE
from torch import nn
from torch.nn.functional import linear
from training.layouts import allow_fp16_on_cpu

from neox.config import ModelConfig, config_from_dict
from neox.model.block import TransformerBlock
from neox.model.build import build_decoder
from neox.model.embedding import Embedding
from neox.model.init import initial_tensor
from neox.model.layers import Decoder, FinalNorm
from neox.model.loss import Targets
from neox.parallel.mesh import Mesh, build_mesh
from neox.training.engine import join_deepspeed
from neox.training.optimizers.build import parameter_groups

CONFIG = config_from_dict(BASE | {"pos_emb": "learned", "gpt_j_residual": True, "no_weight_tying": True})
DIVIDED = config_from_dict(
    BASE | {"pos_emb": "learned", "gpt_j_residual": False, "no_weight_tying": True, "model_parallel_size": 2},
    world_size=2,
)
STEPS = 2
SIZES = {"num_attention_heads": 4, "num_layers": 2}
CLIENT_STATE = {"iteration": STEPS, "args": SIZES | {"model_parallel_size": 1}}


@dataclasses.dataclass(frozen=True)
class Saved:
    """One checkpoint.

    Attributes:
        folder: the `global_step<N>` folder.
        states: `<canonical name>/<state>` as the optimizer had them.
        scaler: its loss scale and counters.
    """

    folder: Path
    states: dict[str, torch.Tensor]
    scaler: dict[str, float]


class Named(nn.Module):
    """A model whose parameters are `sequential.<index>.<name>`."""

    def __init__(self, config: ModelConfig, mesh: Mesh) -> None:
        super().__init__()
        decoder = build_decoder(config, source=partial(initial_tensor, config=config, seed=1), mesh=mesh)
        self.sequential = decoder.layers
        object.__setattr__(self, "decoder", decoder)

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """Mean loss of predicting the next token."""
        return loss_of(self.decoder, tokens_BS)


def loss_of(decoder: Decoder, tokens_BS: torch.Tensor) -> torch.Tensor:
    labels = tokens_BS[:, 1:]
    return decoder(tokens_BS[:, :-1], Targets(labels, torch.full(labels.shape, 1 / labels.numel())))


def save_runs(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Saved]:
    """Train every case for two steps on this rank of a data-parallel group, and save it."""
    torch.set_num_threads(1)
    mesh = build_mesh(CONFIG)
    allow_fp16_on_cpu()
    join_deepspeed()
    return {name: _save_run(root / name, settings, CONFIG.model, mesh) for name, settings in cases.items()}


def save_divided(root: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Saved]:
    """The same on this rank of a tensor-parallel group; the states are what this rank has of them."""
    torch.set_num_threads(1)
    mesh = build_mesh(DIVIDED)
    join_deepspeed()
    return {name: _save_run(root / name, settings, DIVIDED.model, mesh) for name, settings in cases.items()}


def _save_run(root: Path, settings: dict[str, Any], config: ModelConfig, mesh: Mesh) -> Saved:
    import deepspeed

    model = Named(config, mesh)
    groups = parameter_groups(((f"layers.{n.partition('.')[2]}", p) for n, p in model.named_parameters()), 0.1)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-3),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True} | settings,
        mpu=mesh if mesh.tensor_size > 1 else None,
        dist_init_required=False,
    )
    generator = torch.Generator().manual_seed(mesh.data_rank)
    for _ in range(STEPS):
        engine.backward(engine(torch.randint(64, (2, 17), generator=generator)))
        engine.step()
    client = CLIENT_STATE | {"args": SIZES | {"model_parallel_size": mesh.tensor_size}}
    engine.save_checkpoint(str(root), client_state=client)
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    fields = {name: value for name, value in vars(scaler).items() if name.startswith(("cur", "last"))} if scaler else {}
    return Saved(root / f"global_step{STEPS}", _states(engine), fields)


def _states(engine: Any) -> dict[str, torch.Tensor]:
    """What DeepSpeed says that each parameter's state is."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # see `neox.training.state.link_states`
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    if hasattr(engine.optimizer, "fp32_groups"):
        return _unfused_states(engine)
    found = {}
    for name, parameter in engine.module.named_parameters():
        key = name.replace("sequential", "layers").replace("tied_modules.embed", "layers.0")
        key = key if key.startswith("layers.") else f"layers.{key}"
        found[f"{key}/master"] = safe_get_full_fp32_param(parameter).clone()
        for state in ("exp_avg", "exp_avg_sq"):
            found[f"{key}/{state}"] = safe_get_full_optimizer_state(parameter, state).clone()
    return found


def _unfused_states(engine: Any) -> dict[str, torch.Tensor]:
    """The same of an optimizer in half precision without ZeRO."""
    names = {
        id(parameter): name.replace("sequential", "layers") for name, parameter in engine.module.named_parameters()
    }
    found = {}
    for halves, masters in zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True):
        for half, master in zip(halves, masters, strict=True):
            found[f"{names[id(half)]}/master"] = master.detach().clone()
            for state in ("exp_avg", "exp_avg_sq"):
                found[f"{names[id(half)]}/{state}"] = engine.optimizer.optimizer.state[master][state].clone()
    return found


class _Head(Embedding):
    """The embedding a second time, as the projection on the vocabulary."""


def _project(embedding: Embedding, x_BSD: torch.Tensor) -> torch.Tensor:
    return linear(x_BSD, embedding.word_embeddings.weight)


def _loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), labels_BS.flatten())


def save_pipeline(root: Path, settings: dict[str, Any]) -> Saved:
    """Train a model with a tied head in two stages, a rank each, and save it as GPT-NeoX numbers its layers."""
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    join_deepspeed()
    torch.manual_seed(0)
    ends = {"key": "embed", "tied_weight_attr": "word_embeddings.weight"}
    layers = [
        TiedLayerSpec(typename=Embedding, config=CONFIG.model, **ends),
        lambda x: x,
        *(LayerSpec(TransformerBlock, CONFIG.model) for _ in range(CONFIG.model.num_layers)),
        lambda x: x,
        LayerSpec(FinalNorm, CONFIG.model),
        TiedLayerSpec(typename=_Head, config=CONFIG.model, forward_fn=_project, **ends),
    ]
    grid = PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=1)
    model = PipelineModule(layers, topology=grid, loss_fn=_loss, partition_method="type:transformer")
    groups = parameter_groups(((f"layers.{n}", p) for n, p in model.named_parameters()), 0.1)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-3),
        config={"train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True} | settings,
        dist_init_required=False,
    )
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(3))
    for _ in range(STEPS):
        engine.train_batch(iter([(tokens[:, :-1], tokens[:, 1:])]))
    engine.save_checkpoint(str(root), client_state=CLIENT_STATE)
    return Saved(root / f"global_step{STEPS}", _states(engine), {})
