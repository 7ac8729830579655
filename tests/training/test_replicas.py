"""Copies that several ranks hold are compared: a flipped bit is found and its rank named, and nothing else is."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING, allow_fp16_on_cpu
from training.test_resume import figures

from neox.config import Config, config_from_dict
from neox.data import build_datasets
from neox.errors import CorruptionError
from neox.parallel.mesh import Mesh, build_mesh
from neox.parallel.rng import seed_dropout
from neox.training.callbacks import Checkpoints
from neox.training.engine import Engine
from neox.training.fingerprint import fingerprint, wrapped
from neox.training.loop import Callback, Rewind, Run, Step, training_loop
from neox.training.replicas import comparisons
from neox.training.run import batch_maker, start_or_resume, train_loader
from neox.training.state import base_optimizer

STEPS = 3
NORM, MATRIX, EMBEDDING = (
    "layers.2.input_layernorm.weight",
    "layers.3.mlp.linear1.weight",
    "layers.0.word_embeddings.weight",
)
BASE = MODEL | TRAINING | {"train_iters": STEPS, "hidden_dropout": 0.1, "replica_check_interval": 1}


def test_every_bit_counts() -> None:
    """Any flipped bit of any element changes the fingerprint, for each dtype that training keeps."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.float64):
        values = (torch.arange(35).reshape(5, 7) * 3).to(dtype)
        bits = values.view(torch.uint8)
        before, seen = int(fingerprint(values)), set()
        for place in range(bits.numel()):
            for bit in range(8):
                bits.view(-1)[place] ^= 1 << bit
                seen.add(int(fingerprint(values)))
                bits.view(-1)[place] ^= 1 << bit
        assert before not in seen
        assert int(fingerprint(values)) == before


def test_places_count() -> None:
    values = torch.randn(70_000)
    assert int(fingerprint(values)) != int(fingerprint(values.flip(0)))
    swapped = values.clone()
    swapped[[3, 40_003]] = swapped[[40_003, 3]]
    assert int(fingerprint(values)) != int(fingerprint(swapped))


@pytest.mark.parametrize("cut", [1, 16_383, 16_384, 50_000, 5_000_000])
def test_parts_add_up_to_the_whole(cut: int) -> None:
    values = torch.randn(5_300_000)
    parts = int(fingerprint(values[:cut])) + int(fingerprint(values[cut:], start=cut))
    assert wrapped(parts) == int(fingerprint(values))


class Hit:
    """Flips a bit of something on one rank, once, after a step: by default the lowest one of the first byte."""

    def __init__(self, engine: Engine, victim: str, rank: int, after: int, bit: int = 0) -> None:
        self.engine, self.victim, self.rank, self.after = engine, victim, rank, after
        self.byte, self.mask = bit // 8, 1 << bit % 8

    def before_training(self, progress: Any) -> None:
        pass

    def after_step(self, step: Step) -> None:
        if step.progress.iteration == self.after and self.engine.mesh.rank == self.rank:
            self.after = 0
            self.tensor().data.view(-1)[:1].view(torch.uint8)[self.byte] ^= self.mask

    def tensor(self) -> torch.Tensor:
        kind, _, name = self.victim.partition(" ")
        if kind == "masters":
            return base_optimizer(self.engine).param_groups[0]["params"][0]
        parameter = self.engine.parameters()[name]
        if kind == "weights":
            return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
        return base_optimizer(self.engine).state[parameter][kind]


def outcome(config: Config, mesh: Mesh, hit: tuple[str, int, int] | None, *, hit_before_save: bool) -> str:
    """Train; say what the comparison said, or nothing."""
    seed_dropout(1, mesh)
    engine, progress, schedule = start_or_resume(config, mesh)
    callbacks: list[Callback] = comparisons(engine)
    if hit:
        callbacks.insert(0 if hit_before_save else 1, Hit(engine, *hit))
    if config.checkpoint.save is not None:
        callbacks.append(Checkpoints(engine, schedule, last_iteration=STEPS))
    loader = train_loader(config, mesh, build_datasets(config), 0)
    run = Run(engine, loader, batch_maker(config, mesh), schedule, STEPS)
    try:
        training_loop(run, progress, callbacks)
    except (CorruptionError, Rewind) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def outcomes(flats: dict[str, dict[str, Any]], world_size: int) -> dict[str, str]:
    """Several runs on one grid, one after another in the same processes."""
    torch.set_num_threads(1)
    found, mesh = {}, None
    for label, flat in flats.items():
        hit, hit_before_save = flat.pop("hit", None), flat.pop("hit before save", False)
        config = config_from_dict(flat, world_size=world_size)
        mesh = mesh or build_mesh(config)
        if config.model.precision == "fp16":
            allow_fp16_on_cpu()
        found[label] = outcome(config, mesh, hit, hit_before_save=hit_before_save)
    return found


def on_all(flats: dict[str, dict[str, Any]], world_size: int = 4) -> dict[str, str]:
    """What all ranks agree on."""
    by_rank = run_ranks(outcomes, world_size, flats, world_size, timeout=600.0)
    assert all(found == by_rank[0] for found in by_rank)
    return by_rank[0]


def zero(stage: int) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}}


BF16 = {"precision": "bfloat16"}
ADAM8BIT = {"optimizer": {"type": "Adam8bit", "params": {"lr": 1e-3}}}
EXPERTS = {"moe_num_experts": 4, "moe_top_k": 2, "moe_router_type": "topk", "moe_aux_loss_coeff": 0.01}
LAWFUL = {
    "zero0 sequence parallel": {"sequence_parallel": True},
    "zero2 fp16": zero(2) | {"precision": "fp16"},
    "zero3 sequence parallel": zero(3) | {"sequence_parallel": True},
    "muon": zero(1) | {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}},
    "adam8bit zero0": ADAM8BIT,
    "adam8bit zero1": zero(1) | ADAM8BIT | {"weight_decay": 0.0},
    "sm3": {"optimizer": {"type": "sm3", "params": {"lr": 1e-2}}},
    "lora": zero(1) | BF16 | {"lora": {"rank": 4, "dropout": 0.1}},
    "tied accumulated": {"no_weight_tying": False, "gradient_accumulation_steps": 2},
    "query and key norms": {"use_qk_layernorm": True},
    "experts": EXPERTS | {"sequence_parallel": True},
}
HOST = socket.gethostname()
STOPPED = "; start again from the newest checkpoint, and have the memory of that host and its GPU tested"
# On this grid ranks 0 and 1, and 2 and 3, are tensor ranks; 0 and 2, and 1 and 3, hold the same shards.
HIT: dict[str, tuple[dict[str, Any], str]] = {
    "weights of which there are two copies": (
        {"hit": (f"weights {MATRIX}", 3, 2)},
        f"iteration 3: ranks 1 (on {HOST}) and 3 (on {HOST}) differ in {MATRIX} (weights); "
        "2 copies cannot tell which one is right",
    ),
    "weights of which there are four": (
        {"hit": (f"weights {NORM}", 1, 2)},
        f"iteration 3: rank 1 (on {HOST}) differs from the other copies (4 in all) in {NORM} (weights)",
    ),
    "a moment": (
        {"hit": (f"exp_avg_sq {NORM}", 2, 1)},
        f"iteration 2: rank 2 (on {HOST}) differs from the other copies (4 in all) in {NORM} (exp_avg_sq)",
    ),
    "weights that have masters": (
        zero(1) | BF16 | {"hit": (f"weights {MATRIX}", 3, 2)},
        f"iteration 3: rank 3 (on {HOST}) differs from the other copies (3 in all) in {MATRIX} (weights)",
    ),
    "masters": (
        zero(2) | {"hit": ("masters", 2, 2)},
        f"iteration 3: rank 2 (on {HOST}) differs from the other copies (3 in all) in ",
    ),
    "a part of ZeRO 3": (
        zero(3) | BF16 | {"hit": (f"weights {MATRIX}", 0, 2)},
        f"iteration 3: rank 0 (on {HOST}) has weights and masters that differ in {MATRIX} (weights); "
        "nothing tells which are right",
    ),
    "a part of ZeRO 3 that tensor ranks share": (
        zero(3) | BF16 | {"hit": (f"weights {NORM}", 1, 2)},
        f"iteration 3: rank 1 (on {HOST}) differs from the other copies (4 in all) in {NORM} (weights)",
    ),
    "what the next update makes anew": (
        zero(1) | BF16 | {"hit": (f"weights {MATRIX}", 3, 1), "replica_check_interval": 3},
        "",
    ),
}


def test_at_tensor_2_data_2(corpus: str, tmp_path: Path) -> None:
    """One grid of processes runs all: no alarm where nothing is wrong, the right rank where one bit is."""
    common = BASE | ADAMW | {"data_path": corpus, "model_parallel_size": 2}
    flats = {label: common | changes for label, changes in LAWFUL.items()}
    flats |= {label: common | changes for label, (changes, _) in HIT.items()}
    saves = {"save": str(tmp_path), "extra_save_iters": [2, 3], "replica_check_interval": 100}
    flats["before a save"] = common | saves | {"hit": (f"weights {NORM}", 2, 3), "hit before save": True}
    saves = {"save": str(tmp_path / "other"), "extra_save_iters": [3], "on_replica_mismatch": "rewind"}
    flats["to go back"] = common | saves | {"hit": (f"weights {NORM}", 2, 1)}
    found = on_all(flats)

    assert {label: found[label] for label in LAWFUL} == dict.fromkeys(LAWFUL, "")
    for label, (_, expected) in HIT.items():
        said = found[label]
        if expected:
            assert said.startswith(f"CorruptionError: {expected}"), label
            assert said.endswith(STOPPED), label
        else:
            assert not said, label
    which = f"rank 2 (on {HOST}) differs from the other copies (4 in all) in {NORM} (weights)"
    assert found["before a save"] == f"CorruptionError: iteration 3: {which}{STOPPED}"
    assert sorted(path.name for path in tmp_path.glob("*global_step*")) == ["global_step2"]
    assert found["to go back"] == f"Rewind: {which}"


PIPELINE = {
    "tied bf16": BF16 | {"no_weight_tying": False},
    "tied sequence parallel": {"no_weight_tying": False, "sequence_parallel": True, "replica_check_interval": 2},
    "untied": {},
}


def test_at_pipeline_2_tensor_2(corpus: str) -> None:
    common = BASE | ADAMW | {"data_path": corpus, "model_parallel_size": 2, "pipe_parallel_size": 2}
    common |= {"gradient_accumulation_steps": 2}
    flats = {label: common | changes for label, changes in PIPELINE.items()}
    flats["hit"] = common | {"no_weight_tying": False, "hit": (f"weights {EMBEDDING}", 3, 2)}
    found = on_all(flats)
    assert {label: found[label] for label in PIPELINE} == dict.fromkeys(PIPELINE, "")
    assert found["hit"] == (
        f"CorruptionError: iteration 3: rank 3 (on {HOST}) differs from the other copies (4 in all) "
        f"in {EMBEDDING} (weights){STOPPED}"
    )


HIGHEST_OF_EXPONENT = 30


def train_hit(flat: dict[str, Any], world_size: int, hit: tuple[Any, ...]) -> None:
    """A whole run in which a bit flips."""
    torch.set_num_threads(1)
    from neox.training import run

    compared = run.comparisons
    run.comparisons = lambda engine: [*compared(engine), Hit(engine, *hit)]
    run.train(config_from_dict(flat, world_size=world_size))


def test_going_back_mends_the_run(corpus: str, tmp_path: Path) -> None:
    """Losses are, step for step and bit for bit, those of a run in which nothing happened."""
    flat = BASE | ADAMW | {"data_path": corpus, "log_interval": 1, "train_iters": 5, "extra_save_iters": [2]}
    flat |= {"on_replica_mismatch": "rewind"}
    run_ranks(train_hit, 2, flat | {"save": str(tmp_path / "calm")}, 2, (f"weights {NORM}", 1, 0))
    run_ranks(train_hit, 2, flat | {"save": str(tmp_path / "hit")}, 2, (f"weights {NORM}", 1, 3))
    spoils = flat | {"save": str(tmp_path / "spoilt"), "on_bad_loss": "skip_batch"}
    run_ranks(train_hit, 2, spoils, 2, (f"weights {NORM}", 1, 3, HIGHEST_OF_EXPONENT))
    calm = figures(tmp_path / "calm")
    for run in ("hit", "spoilt"):
        hit = figures(tmp_path / run)
        assert (4, "train/rewinds") in hit
        assert {key: value for key, value in hit.items() if key[1] != "train/rewinds"} == calm
    assert not (tmp_path / "spoilt" / "skipped.jsonl").exists()  # its loss was NaN, which was no fault of the batch
