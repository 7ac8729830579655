"""Optimizers against trajectories of upstream's code, their groups, and that each goes on where it stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn
from training.layouts import EPS, MODEL, TRAINING, Recorder, curve_of

from neox.config import Config, config_from_dict
from neox.data import build_datasets
from neox.errors import ConfigError
from neox.parallel.mesh import Mesh, build_mesh
from neox.training.loop import Run, training_loop
from neox.training.optimizers.build import build_optimizer, parameter_groups
from neox.training.run import batch_maker, start_or_resume, train_loader
from neox.training.saving import Saver
from neox.training.state import owned_tensors

GOLDEN = json.loads((Path(__file__).resolve().parents[1] / "data" / "optimizers.json").read_text())
TRAJECTORIES: dict[str, dict[str, Any]] = {
    "sm3_default": {"type": "SM3", "params": {"lr": 0.1}},
    "sm3": {"type": "SM3", "params": {"lr": 0.1, "momentum": 0.9, "beta": 0.5}},
    "madgrad_wd": {"type": "madgrad_wd", "params": {"lr": 0.01}},
}


def config_of(optimizer: dict[str, Any], **changes: Any) -> Config:
    return config_from_dict(MODEL | TRAINING | {"optimizer": optimizer} | changes, world_size=1)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_upstream_trajectory(name: str) -> None:
    golden = GOLDEN["optimizers"][name]
    named = {f"layers.2.mlp.linear{i}.weight": nn.Parameter(torch.tensor(p)) for i, p in enumerate(golden["params"][0])}
    for key, parameter in named.items():
        parameter.canonical_name, parameter.whole_shape = key, parameter.shape  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
    optimizer = build_optimizer(named.items(), config_of(TRAJECTORIES[name]))
    assert len(golden["grads"]) == 5
    for gradients, expected in zip(golden["grads"], golden["params"][1:], strict=True):
        for parameter, gradient in zip(named.values(), gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for parameter, value in zip(named.values(), expected, strict=True):
            torch.testing.assert_close(parameter.detach(), torch.tensor(value), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", GOLDEN["weight_decay_groups"])
def test_weight_decay_groups_are_upstreams(family: str) -> None:
    golden = {group["name"]: group["params"] for group in GOLDEN["weight_decay_groups"][family]}
    names = [name.replace("sequential.", "layers.") for params in golden.values() for name in params]
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in names}
    by_id = {id(p): name for name, p in parameters.items()}
    groups = parameter_groups(parameters.items(), 0.1)
    found = {
        group["name"]: [by_id[id(p)].replace("layers.", "sequential.") for p in group["params"]] for group in groups
    }
    assert found == golden
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


ADAM = {"type": "Adam", "params": {"lr": 3e-3}}
FASTER = {"type": "Adam", "params": {"lr": 2e-2}}
MADGRAD = {"type": "madgrad_wd", "params": {"lr": 1e-3}}
MUON = {"type": "Muon", "params": {"lr": 3e-3}}
UNEVEN = {"norm": "scalenorm", "intermediate_size": 201}
RESUMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sgd_zero2": ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.5}}, {"zero_optimization": {"stage": 2}}),
    "lion_zero3": ({"type": "Lion", "params": {"lr": 1e-3}}, {"zero_optimization": {"stage": 3}}),
    # Two ranks share parameters of 1 and of 201 elements.
    "uneven_zero3": (FASTER, UNEVEN | {"zero_optimization": {"stage": 3}}),
    "uneven_zero3_bf16": (FASTER, UNEVEN | {"zero_optimization": {"stage": 3}, "precision": "bfloat16"}),
    "sm3": ({"type": "SM3", "params": {"lr": 0.05}}, {}),
    "sm3_zero2": ({"type": "SM3", "params": {"lr": 0.05, "momentum": 0.9}}, {"zero_optimization": {"stage": 2}}),
    "madgrad_zero1": (MADGRAD, {"zero_optimization": {"stage": 1}}),
    "muon": (MUON, {}),
    "muon_zero2": (MUON, {"zero_optimization": {"stage": 2}}),
    "cpu_adam": (
        {"type": "cpu_adam", "params": {"lr": 3e-3}},
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    ),
    "adam8bit_zero1": (ADAM, {"use_bnb_optimizer": True, "zero_optimization": {"stage": 1}}),
}
STEPS, SAVED = 4, 2


class SavingRecorder(Recorder):
    """Saves after SAVED steps."""

    schedule: Any = None

    def after_step(self, step: Any) -> None:
        super().after_step(step)
        if step.progress.iteration == SAVED:
            Saver(self.engine, self.schedule).save(step.progress)


def whole_and_resumed(flats: dict[str, dict[str, Any]], world_size: int) -> dict[str, tuple[bool, float, float]]:
    """By case: whether the resumed run ended on the same weights and losses, and its first and last loss."""
    torch.set_num_threads(1)
    mesh: Mesh | None = None
    outcome = {}
    for name, flat in flats.items():
        runs = []
        for changes in ({}, {"load": flat["save"], "iteration": SAVED}):
            config = config_from_dict(flat | changes, world_size=world_size)
            mesh = mesh or build_mesh(config)
            runs.append(weights_and_losses(config, mesh))
        (weights, losses), (resumed, late) = runs
        same = late == losses[SAVED:] and all(np.array_equal(weights[key], resumed[key]) for key in weights)
        outcome[name] = (same, losses[0], losses[-1])
    return outcome


def weights_and_losses(config: Config, mesh: Mesh) -> tuple[dict[str, np.ndarray], list[float]]:
    engine, progress, schedule = start_or_resume(config, mesh)
    loader = train_loader(config, mesh, build_datasets(config), progress.consumed_samples)
    recorder = SavingRecorder(engine)
    recorder.schedule = schedule
    training_loop(Run(engine, loader, batch_maker(config, mesh), schedule, STEPS), progress, [recorder])
    weights = {t.key: t.value.float().numpy() for t in owned_tensors(engine, with_optimizer=False)}
    return weights, [float(step.loss) for step in recorder.steps]


def saving(folder: Path, corpus: str, optimizer: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    flat = {"data_path": corpus, "optimizer": optimizer, "train_iters": STEPS, "save": str(folder)}
    return MODEL | TRAINING | flat | {"checkpoint_factor": 100, "warmup": 0.0} | changes


def test_every_optimizer_goes_on_bitwise(tmp_path: Path, corpus: str) -> None:
    pytest.importorskip("bitsandbytes")
    flats = {name: saving(tmp_path / name, corpus, *case) for name, case in RESUMED.items()}
    results = run_ranks(whole_and_resumed, 2, flats, 2)
    for name in RESUMED:
        assert [rank[name][0] for rank in results] == [True, True], name
        assert results[0][name][2] < results[0][name][1] - 0.1, f"{name} does not learn"


def test_accumulators_of_one_number_at_tensor_parallel(tmp_path: Path, corpus: str) -> None:
    """LoRA's factors of rank 1 have a dimension of 1 that is not the divided one."""
    changes = {"lora": {"rank": 1}, "model_parallel_size": 2, "num_kv_heads": 2}
    flat = saving(tmp_path, corpus, {"type": "SM3", "params": {"lr": 0.05}}, changes)
    results = run_ranks(whole_and_resumed, 2, {"sm3": flat}, 2)
    assert [rank["sm3"][0] for rank in results] == [True, True]


def saved_on_the_way(flat: dict[str, Any], world_size: int) -> dict[str, np.ndarray]:
    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    return weights_and_losses(config, build_mesh(config))[0]


@pytest.mark.parametrize("kind", ["SM3", "Muon"])
def test_whole_matrices_at_every_layout_and_from_one_to_another(tmp_path: Path, corpus: str, kind: str) -> None:
    """Tensor 2, data 2, ZeRO 1 ends where one process does; so does one process that takes its checkpoint up."""
    flat = MODEL | TRAINING | {"data_path": corpus, "train_iters": STEPS, "checkpoint_factor": 100}
    # The gradient of a key's bias is 0 but for rounding, which SM3 divides by its own size.
    eps = {"eps": EPS} if kind == "Muon" else {}
    flat |= {"optimizer": {"type": kind, "params": {"lr": 3e-3, **eps}}, "use_bias_in_attn_linear": False}
    flat |= {"num_kv_heads": 2, "activation": "swiglu", "intermediate_size": 240}
    reference = curve_of(flat, 1).weights
    flat |= {"save": str(tmp_path)}
    divided = run_ranks(saved_on_the_way, 4, flat | {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}, 4)
    found = {name: weight for rank in divided for name, weight in rank.items()}
    resumed = curve_of(flat | {"load": str(tmp_path), "iteration": SAVED}, 1).weights
    for name, weight in reference.items():
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(resumed[name], weight, rtol=0, atol=1e-5, err_msg=name)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "onebitadam": ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}}, "zero_quantized_gradients"),
    "cpu_adam": ({"optimizer": {"type": "cpu_adam", "params": {"lr": 1e-3}}}, "offload_optimizer"),
    "muon_zero3": (
        {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}, "zero_optimization": {"stage": 3}},
        "stage: 1 or 2",
    ),
    "steps": ({"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "ns_steps": 0}}}, "expected 1 to 99 steps, got 0"),
    "nesterov": ({"optimizer": {"type": "Muon", "params": {"lr": 1e-3, "nesterov": 1}}}, "expected true or false"),
    "adjust": ({"optimizer": {"type": "Muon", "params": {"adjust_lr_fn": "x"}}}, "'match_rms_adamw' or 'original'"),
    "adamw_lr": ({"optimizer": {"type": "Muon", "params": {"lr": 0.0, "adamw_lr": 1e-3}}}, "and lr is 0; raise lr"),
    "beta": ({"optimizer": {"type": "SM3", "params": {"lr": 1e-3, "beta": 1.0}}}, "expected less than 1"),
    "unknown": ({"optimizer": {"type": "Lion", "params": {"lr": 1e-3, "beta": 0.9}}}, "did you mean 'betas'"),
    "8bit_sgd": ({"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}, "use_bnb_optimizer": True}, "is for Adam"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_is_one_line(case: str) -> None:
    changes, words = REFUSALS[case]
    with pytest.raises(ConfigError, match=words) as error:
        config_from_dict(MODEL | TRAINING | changes, world_size=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "package"), [("Lion", "pytorch-optimizer"), ("Adam8bit", "bitsandbytes")])
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    def missing(name: str) -> Callable[..., Any]:
        raise ImportError(name)

    monkeypatch.setattr("neox.training.optimizers.build.import_module", missing)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        build_optimizer([], config_of({"type": kind, "params": {"lr": 1e-3}}))
