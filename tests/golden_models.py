"""Models and numbers written by upstream GPT-NeoX, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neox.config import Config, config_from_dict

GOLDENS = Path(__file__).parent / "data" / "goldens"

BASE = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "padded_vocab_size": 64,
    "train_micro_batch_size_per_gpu": 1,
}
CHECKPOINT_KEYS = (
    *("pos_emb", "rotary_pct", "no_weight_tying", "gpt_j_residual", "hidden_size", "num_attention_heads"),
    *("seq_length", "max_position_embeddings"),
)


def read_golden(path: Path) -> tuple[Config, dict[str, np.ndarray], dict[str, torch.Tensor]]:
    """Configuration, arrays, and weights under the names of the file without `w/`."""
    arrays = dict(np.load(path))
    config = config_from_dict(BASE | json.loads(str(arrays["__config__"])), world_size=None)
    weights = {
        name.removeprefix("w/"): torch.from_numpy(array) for name, array in arrays.items() if name.startswith("w/")
    }
    return config, arrays, weights


def read_run(name: str) -> tuple[Config, dict[str, Any]]:
    """Configuration and record (`tokens`, `losses`) of one of the small checkpoints."""
    record = json.loads((GOLDENS / name / "golden.json").read_text())
    given = {key: record["cfg"][key] for key in CHECKPOINT_KEYS}
    return config_from_dict(BASE | given), record


def canonical(name: str) -> str:
    """`sequential.2.x` -> `layers.2.x`."""
    return name.replace("sequential.", "layers.", 1)
