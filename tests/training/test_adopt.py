"""A run of GPT-NeoX is taken up mid-flight: its state in memory is the file's, and the next step is Adam's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import CHECKPOINT_KEYS, GOLDENS
from ranks import run_ranks
from training.layouts import TRAINING
from training.test_resume import figures

from neox.checkpoint.load import read_loaded_model
from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.runs import open_run
from neox.checkpoint.weights import weight_source
from neox.config import Config, config_from_dict
from neox.data import IndexedDatasetWriter
from neox.model.build import build_decoder
from neox.model.loss import Targets

MOMENTS = ("exp_avg", "exp_avg_sq")
LLAMA_STEPS, LLAMA_BATCH = 5, 4


@dataclass(frozen=True)
class Adopted:
    """A run of GPT-NeoX.

    Attributes:
        root: folder of checkpoints.
        flat: configuration to go on with, from its own file.
        iteration, samples: how far it had come.
        moments: `<name>/<moment>`, read here independently of the project's reader.
        rate: the learning rate that its optimizer had after the last step.
    """

    root: Path
    flat: dict[str, Any]
    iteration: int
    samples: int
    moments: dict[str, torch.Tensor]
    rate: float


def matrices_first(weights: dict[str, torch.Tensor]) -> list[list[str]]:
    """GPT-NeoX's two groups: what decays, and biases and norms."""
    others = [name for name in weights if name.endswith("bias") or "norm" in name.split(".")[-2]]
    return [[name for name in weights if name not in others], others]


def sequential_run() -> Adopted:
    root = GOLDENS / "seq"
    state = torch.load(root / "global_step4" / "mp_rank_00_model_states.pt", weights_only=False)
    saved, moments = state["optimizer"], {}
    names = [name for group in matrices_first(state["module"]) for name in group]
    for number, name in enumerate(names):
        for moment in MOMENTS:
            moments[f"{name.replace('sequential', 'layers', 1)}/{moment}"] = saved["state"][number][moment]
    record = json.loads((root / "golden.json").read_text())
    return Adopted(root, settings_of(record["cfg"]), 4, 8, moments, saved["param_groups"][0]["lr"])


def zero1_run() -> Adopted:
    """Each rank has half of each group's vector; DeepSpeed wrote down whose elements are where."""
    root = GOLDENS / "zero1_dp2"
    folder = root / "global_step3"
    weights = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    pieces: dict[str, list[torch.Tensor]] = {}
    for rank in (0, 1):
        path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        saved = torch.load(path, weights_only=False)["optimizer_state_dict"]
        states = saved["base_optimizer_state"]
        for group, mapping in enumerate(saved["param_slice_mappings"]):
            for name, place in mapping.items():
                for moment in MOMENTS:
                    vector = states["state"][group][moment]
                    piece = vector[place.start : place.start + place.numel]
                    pieces.setdefault(f"{name}/{moment}", []).append(piece)
    moments = {
        key.replace("sequential", "layers", 1): torch.cat(parts).view_as(weights[key.partition("/")[0]])
        for key, parts in pieces.items()
    }
    record = json.loads((root / "golden.json").read_text())
    return Adopted(root, settings_of(record["cfg"]), 3, 12, moments, states["param_groups"][0]["lr"])


def settings_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run's own file that matter, with two steps more to go."""
    kept = (
        "optimizer",
        "gradient_clipping",
        "weight_decay",
        "lr_decay_style",
        "min_lr",
        "warmup",
        "pipe_parallel_size",
    )
    flat = {key: cfg[key] for key in (*kept, *CHECKPOINT_KEYS) if key in cfg}
    return flat | {"train_iters": cfg["train_iters"] + 2, "lr_decay_iters": cfg["train_iters"], "train_batch_size": 2}


def llama_run(root: Path) -> Adopted:
    """The checkpoint with grouped heads and a gate, in the pipeline layout, with moments made up."""
    source = GOLDENS / "e_llama_gqa"
    reader = open_checkpoint(source / "ckpt")
    folder = root / "global_step5"
    folder.mkdir(parents=True)
    for path in reader.folder.glob("layer_*.pt"):
        (folder / path.name).symlink_to(path)
    (folder / "configs").mkdir()
    given = json.loads((source / "e_llama_gqa.yml").read_text())
    (folder / "configs" / "run.yml").write_text(json.dumps(given))
    (root / "latest").write_text(folder.name)
    generator = torch.Generator().manual_seed(3)
    groups = matrices_first({name: torch.empty(shape) for name, shape in reader.shapes().items()})
    moments, states = {}, {}
    for number, name in enumerate(name for group in groups for name in group):
        mean = 1e-3 * torch.randn(reader.shapes()[name], generator=generator)
        square = 1e-5 * torch.rand(mean.shape, generator=generator)
        states[number] = {"step": LLAMA_STEPS, "exp_avg": mean, "exp_avg_sq": square}
        moments |= {f"{name}/exp_avg": mean, f"{name}/exp_avg_sq": square}
    rate = 0.0007
    numbers = iter(range(len(states)))
    param_groups = [{"lr": rate, "params": [next(numbers) for _ in group]} for group in groups]
    state = {
        "module": None,
        "optimizer": {"state": states, "param_groups": param_groups},
        "lr_scheduler": schedule_of(given),
        "iteration": LLAMA_STEPS,
        "global_steps": LLAMA_STEPS,
        "global_samples": LLAMA_STEPS * LLAMA_BATCH,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": LLAMA_BATCH},
    }
    torch.save(state, folder / "mp_rank_00_model_states.pt")
    dropped = ("data_path", "vocab_file", "save", "checkpoint_factor", "extra_save_iters", "train_iters")
    flat = {key: value for key, value in given.items() if key not in dropped} | {"train_iters": 10}
    return Adopted(root, flat, LLAMA_STEPS, LLAMA_STEPS * LLAMA_BATCH, moments, rate)


def schedule_of(given: dict[str, Any]) -> dict[str, Any]:
    """As GPT-NeoX saves it: the warmup in iterations, and five steps made."""
    return {
        "start_lr": given["optimizer"]["params"]["lr"],
        "warmup_iter": given["warmup"] * given["lr_decay_iters"],
        "num_iters": LLAMA_STEPS,
        "decay_style": given["lr_decay_style"],
        "end_iter": given["lr_decay_iters"],
        "min_lr": given["min_lr"],
    }


@pytest.fixture(scope="module", params=["seq", "zero1_dp2", "e_llama_gqa"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adopted:
    if request.param == "e_llama_gqa":
        return llama_run(tmp_path_factory.mktemp("llama") / "ckpt")
    return sequential_run() if request.param == "seq" else zero1_run()


def config_of(flat: dict[str, Any], world_size: int) -> Config:
    return config_from_dict(flat, world_size=world_size, read_model=read_loaded_model)


def tokens_for(config: Config) -> torch.Tensor:
    assert config.batch.train_batch_size is not None
    generator = torch.Generator().manual_seed(11)
    return torch.randint(1, 60, (config.batch.train_batch_size, config.model.seq_length + 1), generator=generator)


@dataclass(frozen=True)
class Taken:
    """What a rank had after it took the run up, and after a step: `<name>` and `<name>/<state>`, whole."""

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    progress: Any
    rate: float


def take_up(flat: dict[str, Any], world_size: int) -> Taken:
    """Resume on this rank, and take one step on tokens made up."""
    from neox.parallel.mesh import build_mesh
    from neox.training.batches import global_batch, micro_batch
    from neox.training.run import start_or_resume

    torch.set_num_threads(1)
    config = config_of(flat, world_size)
    mesh = build_mesh(config)
    engine, progress, schedule = start_or_resume(config, mesh)
    before = dict(owned(engine))
    rows, size = tokens_for(config), config.batch.train_micro_batch_size_per_gpu
    micro_batches = []
    for number in range(config.batch.gradient_accumulation_steps):
        first = (number * mesh.data_size + mesh.data_rank) * size
        item = {"tokens": rows[first : first + size]}
        micro_batches.append(micro_batch(item, device=mesh.device, mask_after=None))
    rate = schedule.lr_at(progress.schedule_step)
    engine.set_learning_rate(rate)
    engine.train_step(global_batch(micro_batches, mesh))
    return Taken(before, dict(owned(engine)), progress, rate)


def owned(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    from neox.training.state import owned_tensors

    for tensor in owned_tensors(engine, with_optimizer=True):
        yield tensor.key, tensor.value.clone()


def adam_step(run: Adopted, config: Config, rate: float) -> dict[str, torch.Tensor]:
    """One step of AdamW (Loshchilov & Hutter 2019) from the state of the file, written out."""
    weights = weight_source(open_checkpoint(run.root))
    model = build_decoder(config.model, source=weights)
    rows = tokens_for(config)
    labels = rows[:, 1:]
    model(rows[:, :-1], Targets(labels, torch.full(labels.shape, 1 / labels.numel()))).backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
    scale = min(1.0, config.optimizer.gradient_clipping / float(norm))
    decayed = matrices_first({name: p.data for name, p in parameters.items()})[0]
    (beta1, beta2), epsilon = config.optimizer.params["betas"], config.optimizer.params["eps"]
    step, found = run.iteration + 1, {}
    for name, parameter in parameters.items():
        gradient = scale * gradients[name]
        mean = beta1 * run.moments[f"{name}/exp_avg"] + (1 - beta1) * gradient
        square = beta2 * run.moments[f"{name}/exp_avg_sq"] + (1 - beta2) * gradient.square()
        decay = config.optimizer.weight_decay if name in decayed else 0.0
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + epsilon)
        found[name] = parameter.data * (1 - rate * decay) - rate * update
        found |= {f"{name}/exp_avg": mean, f"{name}/exp_avg_sq": square}
    return found


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_process": (1, {"zero_optimization": {"stage": 0}}),
    "tp2_zero1": (2, {"model_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "pp2": (2, {"pipe_parallel_size": 2, "zero_optimization": {"stage": 1}}),
    "zero3_dp2": (2, {"zero_optimization": {"stage": 3}, "pipe_parallel_size": 0}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_the_files_and_the_step_is_adams(run: Adopted, layout: str) -> None:
    world_size, changes = LAYOUTS[layout]
    flat = run.flat | {"load": str(run.root), "data_path": "unused"} | changes
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        flat.pop(key, None)
    flat["train_batch_size"] = run.samples // run.iteration
    taken = run_ranks(take_up, world_size, flat, world_size)
    before = {key: value for rank in taken for key, value in rank.before.items()}
    after = {key: value for rank in taken for key, value in rank.after.items()}
    reader = open_checkpoint(run.root)
    assert before.keys() == set(reader.names()) | run.moments.keys()
    for key, value in before.items():
        assert torch.equal(value, run.moments[key] if "/" in key else reader.tensor(key)), key
    progress = taken[0].progress
    assert (progress.iteration, progress.consumed_samples) == (run.iteration, run.samples)
    assert (progress.schedule_step, progress.optimizer_step) == (run.iteration, run.iteration)
    expected = adam_step(run, config_of(flat, world_size), taken[0].rate)
    assert after.keys() == expected.keys()
    for key, value in after.items():
        # The bias of keys has no gradient but rounding, which Adam divides by its own size.
        square = expected[key if "/" in key else f"{key}/exp_avg_sq"]
        counts = torch.ones_like(value, dtype=torch.bool) if "/" in key else square > 1e-12
        difference = (value - expected[key]).abs()[counts].max()
        assert difference <= 1e-6, (key, difference)


def test_the_rate_goes_on_where_the_file_left_it(run: Adopted) -> None:
    from neox.training.run import agreed_schedule

    reader = open_run(run.root / (run.root / "latest").read_text())
    assert reader is not None
    config = config_of(run.flat | {"load": str(run.root)}, 1)
    schedule = agreed_schedule(config, reader)
    if run.root.name != "ckpt":  # whose rate is made up
        assert schedule.lr_at(reader.manifest.progress.schedule_step) == pytest.approx(run.rate, rel=1e-6)


@pytest.fixture(scope="module")
def few_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    prefix = tmp_path_factory.mktemp("few") / "few_text_document"
    generator = np.random.default_rng(0)
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for _ in range(20):
            writer.add_document(generator.integers(1, 60, size=50).astype(np.uint16))
    return str(prefix)


def train_on(flat: dict[str, Any], world_size: int) -> list[str]:
    """What train.py does; returns what it prints first."""
    from neox.training.contract import told
    from neox.training.origin import origin_of
    from neox.training.preflight import prepare, remarks
    from neox.training.run import train

    torch.set_num_threads(1)
    config = prepare(config_of(flat, world_size))
    lines = [*remarks(config), *told(config, origin_of(config))]
    train(config)
    return lines


def test_training_goes_on_and_is_saved_as_ours(tmp_path: Path, few_tokens: str) -> None:
    run = zero1_run()
    flat = TRAINING | run.flat | {"data_path": few_tokens, "load": str(run.root), "log_interval": 1}
    layouts = {"one": (1, {}), "tp2": (2, {"model_parallel_size": 2, "zero_optimization": {"stage": 1}})}
    for name, (world_size, layout) in layouts.items():
        save = {"save": str(tmp_path / name), "checkpoint_factor": 5}
        lines = run_ranks(train_on, world_size, flat | save | layout, world_size)[0]
        assert any(line.endswith("global_step3: iteration 3, 12 samples consumed") for line in lines)
        assert "  differs: code, packages and data: not recorded in the checkpoint" in lines
    one, tp2 = figures(tmp_path / "one"), figures(tmp_path / "tp2")
    assert {step for step, _ in one} == {4, 5, 6}
    for step in (4, 5, 6):
        assert tp2[step, "train/lm_loss"] == pytest.approx(one[step, "train/lm_loss"], abs=1e-4)
    ours = open_run(tmp_path / "tp2" / "global_step5")
    assert ours is not None
    assert ours.manifest.progress.consumed_samples == 16
    assert ours.manifest.progress.optimizer_step == 5
