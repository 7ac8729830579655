"""A model with experts: every layout gives the losses, gradient norms, weights and logits of one process.

The load-balancing loss weighs as much as the model's own here, and belongs to a micro-batch: all layouts have the same.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import MIXTRAL
from ranks import run_ranks
from training.layouts import ADAMW, EPS, TRAINING, VOCABULARY, Recorder, allow_fp16_on_cpu

SIZES: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 32,
    "padded_vocab_size": VOCABULARY,
    "init_method_std": 0.1,
}
LOSSES = {"moe_aux_loss_coeff": 1.0, "moe_z_loss_coeff": 0.05}
RUN: dict[str, Any] = {"train_iters": 5, "train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "warmup": 0.2}
ZERO3 = {"zero_optimization": {"stage": 3}}
FP16 = {"precision": "fp16", "fp16": {"enabled": True, "initial_scale_power": 9}, "zero_optimization": {"stage": 1}}
MUON = {"optimizer": {"type": "Muon", "params": {"lr": 0.02, "adamw_lr": 3e-3, "eps": EPS}}}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "one": {},
        "recomputed": {"checkpoint_activations": True},
        "fp16": FP16,
        "without": dict.fromkeys(LOSSES, 0.0),
        "muon": MUON,
    },
    2: {
        "pp2": {"pipe_parallel_size": 2},
        "dp2": {},
        "zero1": {"zero_optimization": {"stage": 1}},
        "zero2": {"zero_optimization": {"stage": 2}},
        "zero3 recomputed": ZERO3 | {"checkpoint_activations": True},
        "muon zero1": MUON | {"zero_optimization": {"stage": 1}},
        "tp2": {"model_parallel_size": 2},
        "muon tp2": MUON | {"model_parallel_size": 2},
    },
    4: {
        "tp2 pp2": {"model_parallel_size": 2, "pipe_parallel_size": 2},
        "tp2 pp2 sequence recomputed": {
            "model_parallel_size": 2,
            "pipe_parallel_size": 2,
            "sequence_parallel": True,
            "checkpoint_activations": True,
        },
        "tp2 sequence zero3": ZERO3 | {"model_parallel_size": 2, "sequence_parallel": True},
    },
}
LOADED = ("one", "tp2", "pp2", "tp2 pp2")
"""Layouts that load a folder of transformers' own making."""

EXACT = [name for layouts in LAYOUTS.values() for name in layouts if name not in ("one", "fp16", "without", "muon")]


@dataclass
class Outcome:
    """What a rank saw of a layout.

    Attributes:
        losses, norms: of each step.
        scale: what the losses of routers were multiplied by in the last step.
        loss_scale: that of half precision then.
        busiest: load of the busiest expert at the end.
        weights: what this rank owns of the model at the end.
        logits: of the first micro-batch under the weights of transformers' own making; only the last stage has them.
    """

    losses: list[float]
    norms: list[float]
    scale: float
    loss_scale: float
    busiest: float
    weights: dict[str, np.ndarray]
    logits: np.ndarray | None


def flat_of(corpus: str, changes: dict[str, Any]) -> dict[str, Any]:
    return SIZES | MIXTRAL | LOSSES | TRAINING | ADAMW | RUN | {"data_path": corpus} | changes


def run_layouts(layouts: dict[str, dict[str, Any]], corpus: str, folder: str) -> dict[str, Outcome]:
    """Train each layout on this rank, one after another, and load the folder into some."""
    torch.set_num_threads(1)
    allow_fp16_on_cpu()
    return {
        name: _run(flat_of(corpus, changes), folder if name in LOADED else None) for name, changes in layouts.items()
    }


def _run(flat: dict[str, Any], folder: str | None) -> Outcome:
    from neox.config import config_from_dict
    from neox.model.experts import Experts
    from neox.training.metrics.expert_load import busiest_expert
    from neox.training.state import owned_tensors

    world_size = int(os.environ["WORLD_SIZE"])
    engine, recorder = _train(config_from_dict(flat, world_size=world_size))
    return Outcome(
        losses=[float(step.loss) for step in recorder.steps],
        norms=[float(step.gradient_norm) for step in recorder.steps],
        scale=next(m.loss_scale for m in engine.deepspeed.module.modules() if isinstance(m, Experts)),
        loss_scale=recorder.scales[-2] or 1.0,
        busiest=busiest_expert(engine),
        weights={t.key: t.value.float().numpy() for t in owned_tensors(engine, with_optimizer=False)},
        logits=_loaded_logits(flat | {"load": folder, "finetune": True}, world_size) if folder else None,
    )


def _train(config: Any) -> tuple[Any, Recorder]:
    from neox.data import build_datasets
    from neox.parallel.rng import seed_dropout
    from neox.training.loop import Run, training_loop
    from neox.training.run import batch_maker, start_or_resume, train_loader

    mesh = _mesh(config)
    seed_dropout(config.training.seed, mesh)
    engine, progress, schedule = start_or_resume(config, mesh)
    loader = train_loader(config, mesh, build_datasets(config), progress.consumed_samples)
    recorder = Recorder(engine)
    steps = config.training.train_iters
    training_loop(Run(engine, loader, batch_maker(config, mesh), schedule, steps), progress, [recorder])
    return engine, recorder


def _mesh(config: Any) -> Any:
    """The groups of a run, those of the one before it forgotten by megatron-core and DeepSpeed."""
    from deepspeed.utils import groups

    from neox.parallel.mesh import build_mesh, import_megatron

    import_megatron().destroy_model_parallel()
    groups.mpu = None
    return build_mesh(config)


def _loaded_logits(flat: dict[str, Any], world_size: int) -> np.ndarray | None:
    """Logits of fixed tokens as the engine computes them, kept where its head makes the loss of them."""
    from neox.checkpoint.load import read_loaded_model
    from neox.config import config_from_dict
    from neox.model.head import OutputHead
    from neox.training.batches import global_batch, micro_batch
    from neox.training.run import start_or_resume

    config = config_from_dict(flat, world_size=world_size, read_model=read_loaded_model)
    mesh = _mesh(config)
    engine, _, _ = start_or_resume(config, mesh)
    kept: list[torch.Tensor] = []
    for head in (m for m in engine.deepspeed.module.modules() if isinstance(m, OutputHead)):
        head.loss = _keeping(head, kept)  # type: ignore[method-assign]
    rows = fixed_tokens()
    engine.evaluate(global_batch([micro_batch({"tokens": rows}, device=mesh.device, mask_after=None)], mesh))
    return kept[0].float().numpy() if kept else None


def _keeping(head: Any, kept: list[torch.Tensor]) -> Any:
    loss = head.loss

    def keep_and_lose(x_BSD: torch.Tensor, weight_VD: torch.Tensor, targets: Any) -> torch.Tensor:
        kept.append(head.vocabulary.collect(head.vocabulary.enter(x_BSD) @ weight_VD.T).detach())
        return loss(x_BSD, weight_VD, targets)

    return keep_and_lose


def fixed_tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder of transformers' own making, and its logits of the fixed tokens in float64.

    The matrices are small enough that the layers do not enlarge the rounding of fp32.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(3)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    experts = {"num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **experts, initializer_range=0.1)).eval()
    folder = tmp_path_factory.mktemp("mixtral") / "tiny-mixtral"
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    model.set_experts_implementation("eager")  # the default has no kernel for float64
    with torch.no_grad():
        return folder, model.double()(fixed_tokens()[:, :-1]).logits.numpy()


@pytest.fixture(scope="module")
def found(corpus: str, theirs: tuple[Path, np.ndarray]) -> dict[str, Outcome]:
    """Every layout: figures of the last rank, weights of whoever owned them."""
    outcomes: dict[str, Outcome] = {}
    for world_size, layouts in LAYOUTS.items():
        ranks = run_ranks(run_layouts, world_size, layouts, corpus, str(theirs[0]))
        for name in layouts:
            outcomes[name] = ranks[-1][name]
            for rank in ranks:
                outcomes[name].weights |= rank[name].weights
    return outcomes


@pytest.mark.parametrize("layout", EXACT)
def test_layout_equals_one_process(found: dict[str, Outcome], layout: str) -> None:
    one, other = found["muon" if "muon" in layout else "one"], found[layout]
    np.testing.assert_allclose(other.losses, one.losses, rtol=0, atol=2e-5)
    np.testing.assert_allclose(other.norms, one.norms, rtol=2e-5)
    assert other.weights.keys() == one.weights.keys()
    for name, weight in one.weights.items():
        np.testing.assert_allclose(other.weights[name], weight, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("layout", LOADED)
def test_a_folder_of_transformers_gives_its_logits(
    found: dict[str, Outcome], theirs: tuple[Path, np.ndarray], layout: str
) -> None:
    logits = found[layout].logits
    assert logits is not None
    assert theirs[1].std() > 0.3
    np.testing.assert_allclose(logits, theirs[1], rtol=0, atol=1e-5)


def test_the_losses_of_routers_train_and_are_not_reported(found: dict[str, Outcome]) -> None:
    one, without = found["one"], found["without"]
    assert one.losses[0] == without.losses[0]
    assert abs(one.norms[0] - without.norms[0]) > 0.1 * without.norms[0]
    assert one.losses[-1] != without.losses[-1]


def test_they_are_means_over_micro_batches(found: dict[str, Outcome]) -> None:
    assert {name: round(1 / found[name].scale) for name in ("one", "dp2", "tp2", "pp2")} == {
        "one": 4,
        "dp2": 2,
        "tp2": 4,
        "pp2": 4,
    }


def test_the_load_is_that_of_all_blocks(found: dict[str, Outcome]) -> None:
    one = found["one"].busiest
    assert 1.0 < one <= 2.5
    for name in ("tp2", "pp2", "recomputed", "tp2 pp2 sequence recomputed"):
        assert found[name].busiest == pytest.approx(one, rel=1e-6)


def test_half_precision_scales_them_with_the_loss(found: dict[str, Outcome]) -> None:
    assert found["fp16"].scale == found["fp16"].loss_scale / 4
    assert found["fp16"].loss_scale >= 2**8
    np.testing.assert_allclose(found["fp16"].losses, found["one"].losses, rtol=0, atol=5e-2)
    half, one, without = (np.array(found[name].norms) for name in ("fp16", "one", "without"))
    np.testing.assert_allclose(half[0], one[0], rtol=5e-3)
    # Later, rounding sends some tokens to other experts; without these losses the norms are much further away.
    assert (np.abs(half - one) < 0.25 * np.abs(one - without)).all()
