"""Small preference data, and runs on them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import run_ranks
from training.layouts import EPS

from neox.config import config_from_dict
from neox.data import IndexedDatasetWriter

VOCABULARY = 61
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 24,
    "max_position_embeddings": 24,
    "pos_emb": "rotary",
    "no_weight_tying": True,
    "padded_vocab_size": VOCABULARY,
    "pack_impl": "unpacked",
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 8,
    "train_iters": 6,
    "lr_decay_style": "constant",
    "eval_iters": 0,
    "num_workers": 0,
    "precision": "fp32",
    "log_interval": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": EPS}},
    "gradient_clipping": 1.0,
}
DOCUMENTS = 40


def write_documents(
    prefix: Path, *, low: int, high: int, for_rewards: bool = False, seed: int = 0, documents: int = DOCUMENTS
) -> tuple[str, str]:
    """Documents with a random prompt and a completion of tokens from `low` to before `high`; and their labels.

    The prompts depend on `seed` alone. With `for_rewards` only the last token has a label.
    """
    prompts, drawn = np.random.RandomState(seed), np.random.RandomState(1000 * low + seed)
    text, labels = f"{prefix}_document", f"{prefix}_label_document"
    with IndexedDatasetWriter(text, np.int32) as tokens, IndexedDatasetWriter(labels, np.int32) as masks:
        for _ in range(documents):
            prompt = prompts.randint(0, VOCABULARY, prompts.randint(2, 6))
            completion = drawn.randint(low, high, drawn.randint(3, 24))
            row = np.concatenate((prompt, completion))
            tokens.add_document(row)
            scored = np.arange(len(row)) >= (len(row) - 1 if for_rewards else len(prompt))
            masks.add_document(np.where(scored, row, -100))
    return text, labels


def pairs(folder: Path, *, for_rewards: bool = False, splits: tuple[str, ...] = ("train",)) -> dict[str, Any]:
    """Keys of pairs whose preferred completions use other tokens than the rejected ones."""
    found: dict[str, Any] = {"dataset_impl": "pairwise"}
    for number, split in enumerate(splits):
        for side, low, high in (("pos", 0, 30), ("neg", 30, 60)):
            text, labels = write_documents(
                folder / f"{split}_{side}", low=low, high=high, for_rewards=for_rewards, seed=number
            )
            found[f"{side}_{split}_data_paths"] = [text]
            found[f"{side}_{split}_label_data_paths"] = [labels]
    return found


def rewarded(folder: Path, *, splits: tuple[str, ...] = ("train",)) -> dict[str, Any]:
    """Keys of documents whose reward is 1 where the completion is of one kind of tokens, -1 where of another."""
    found: dict[str, Any] = {}
    for number, split in enumerate(splits):
        columns = []
        for sign, (low, high) in ((1, (0, 30)), (-1, (30, 60))):
            name = folder / f"{split}_{'good' if sign > 0 else 'bad'}"
            text, labels = write_documents(name, low=low, high=high, seed=number)
            with IndexedDatasetWriter(f"{name}_reward_document", np.float32) as rewards:
                for _ in range(DOCUMENTS):
                    rewards.add_document(np.array([sign], np.float32))
            columns.append((text, labels, f"{name}_reward_document"))
        for kind, paths in zip(("", "_label", "_reward"), zip(*columns, strict=True), strict=True):
            found[f"{split}{kind}_data_paths"] = list(paths)
    return found


def trained(flat: dict[str, Any], world_size: int) -> list[dict[str, float]]:
    """Figures of every step of a run on new processes, of the training data and of the others."""
    run_ranks(train_here, world_size, flat, world_size)
    return logged(Path(flat["save"]))


def logged(folder: Path) -> list[dict[str, float]]:
    """Figures of every step that a run has logged, without those of the clock."""
    found: dict[int, dict[str, float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {n: v for n, v in record.items() if n.startswith(("train/", "validation/", "test/"))}
        found.setdefault(record["step"], {}).update(kept)
    return [found[step] for step in sorted(found)]


def train_here(flat: dict[str, Any], world_size: int) -> None:
    torch.set_num_threads(1)
    from neox.training.preflight import prepare
    from neox.training.run import train

    train(prepare(config_from_dict(flat, world_size=world_size)))
