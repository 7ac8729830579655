"""Checkpoints of upstream's, loaded at every layout of ours: its logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from golden_models import BASE, CHECKPOINT_KEYS, GOLDENS, read_run
from ranks import run_ranks
from torch.nn.functional import linear

from neox.checkpoint.open import open_checkpoint
from neox.checkpoint.weights import weight_source
from neox.config import Config, config_from_dict
from neox.model.build import build_decoder
from neox.model.head import OutputHead
from neox.parallel.mesh import Mesh, build_mesh

WITH_LOGITS = ("a_neox_pp0", "e_llama_gqa")
SMALL = ("seq", "pipe", "seq_tp2", "pipe_tp2", "pipe_pp2_tied", "zero1_dp2")
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
"""Tensor-parallel size, pipeline stages."""


def keys_and_folder(name: str) -> tuple[dict[str, Any], Path]:
    """Flat keys of a run's model, and where its checkpoint is."""
    if name in WITH_LOGITS:
        keys = yaml.safe_load((GOLDENS / name / f"{name}.yml").read_text())
        return keys | {"padded_vocab_size": 512}, GOLDENS / name / "ckpt"
    _, record = read_run(name)
    return BASE | {key: record["cfg"][key] for key in CHECKPOINT_KEYS}, GOLDENS / name


def logits_here(tensor: int, pipe: int) -> dict[str, np.ndarray]:
    """Logits of every checkpoint on this rank; of ranks but those of the last stage nothing."""
    from neox.training.engine import join_deepspeed

    torch.set_num_threads(1)
    layout = {"model_parallel_size": tensor, "pipe_parallel_size": pipe if pipe > 1 else 0}
    found: dict[str, np.ndarray] = {}
    mesh = None
    for name in (*WITH_LOGITS, *SMALL):
        keys, folder = keys_and_folder(name)
        config = config_from_dict(keys | layout, world_size=tensor * pipe)
        mesh = mesh or build_mesh(config)
        join_deepspeed()
        with torch.no_grad():
            logits = _logits(config, mesh, folder, tokens_of(name))
        if logits is not None:
            found[name] = logits.numpy()
    return found


def tokens_of(name: str) -> torch.Tensor:
    if name in WITH_LOGITS:
        return torch.from_numpy(np.load(GOLDENS / name / "logits.npz")["input_ids"])
    return torch.tensor(read_run(name)[1]["tokens"][0])[:, :-1]


def _logits(config: Config, mesh: Mesh, folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor | None:
    from neox.training.pipeline import StagedDecoder

    source = weight_source(open_checkpoint(folder))
    if mesh.pipe_size == 1:
        return build_decoder(config.model, source=source, mesh=mesh)(tokens_BS)
    stage = StagedDecoder(config, mesh, source)
    if mesh.pipe_rank == 0:
        dist.send(stage(tokens_BS), mesh.rank + mesh.tensor_size)
        return None
    hidden_BSD = torch.empty(*tokens_BS.shape, config.model.hidden_size)
    dist.recv(hidden_BSD, mesh.rank - mesh.tensor_size)
    output_BSD, weight_VD = stage(hidden_BSD)
    head = next(module for module in stage.modules() if isinstance(module, OutputHead))
    return head.vocabulary.collect(linear(output_BSD, weight_VD))


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    """Logits in this process: upstream's where it gave them, ours for the others."""
    expected = {name: np.load(GOLDENS / name / "logits.npz")["logits"] for name in WITH_LOGITS}
    for name in SMALL:
        keys, folder = keys_and_folder(name)
        model = build_decoder(config_from_dict(keys).model, source=weight_source(open_checkpoint(folder)))
        with torch.no_grad():
            expected[name] = model(tokens_of(name)).numpy()
    return expected


@pytest.mark.parametrize(("tensor", "pipe"), LAYOUTS)
def test_every_checkpoint_gives_its_logits(alone: dict[str, np.ndarray], tensor: int, pipe: int) -> None:
    by_rank = run_ranks(logits_here, tensor * pipe, tensor, pipe)
    last = by_rank[-tensor:]
    for name, expected in alone.items():
        for found in last:
            assert found[name].shape == expected.shape
            assert np.abs(found[name] - expected).max() <= 1e-5, name
