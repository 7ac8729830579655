"""A configuration that every test starts from."""

from typing import Any


def sample(**changes: Any) -> dict[str, Any]:
    """Flat keys of a small model ready to train, with `changes`; a change to None removes the key."""
    flat: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "seq_length": 32,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
        "train_iters": 100,
        "data_path": "corpus_text_document",
    }
    return {key: value for key, value in (flat | changes).items() if value is not None}
