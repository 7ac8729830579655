"""What only a CUDA device can show: the same run as on the CPU, in fp32 and in bf16 with compiled blocks."""

from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.layouts import ADAMW, MODEL, TRAINING, Curve, run_layout, write_corpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("compilers"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus_text_document")
    return MODEL | TRAINING | ADAMW | {"data_path": corpus}


def on_the_cpu(flat: dict[str, Any], world_size: int) -> Curve:
    torch.cuda.is_available = lambda: False
    return run_layout(flat, world_size)


EXPERTS = {
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_router_type": "topk",
    "moe_aux_loss_coeff": 0.02,
    "train_iters": 5,
}


@pytest.mark.parametrize("changes", [{}, EXPERTS, EXPERTS | {"compile": True}], ids=["mlp", "experts", "compiled"])
def test_fp32_follows_the_cpu(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    expected = run_ranks(on_the_cpu, 1, settings | changes | {"compile": False}, 1)[0]
    found = run_ranks(run_layout, 1, settings | {"compile": False} | changes, 1)[0]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_learns_at_every_stage(settings: dict[str, Any], stage: int, compiled: bool) -> None:
    changes = {"precision": "bfloat16", "zero_optimization": {"stage": stage}, "compile": compiled}
    expected = run_ranks(on_the_cpu, 1, settings, 1)[0]
    found = run_ranks(run_layout, 1, settings | changes, 1)[0]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=5e-2)
