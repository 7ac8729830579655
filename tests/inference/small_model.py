"""A small random model, in memory and as a checkpoint."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.native.manifest import Layout, Manifest, Progress
from neox.checkpoint.native.store import StoredTensor, Team, write_checkpoint
from neox.config import Config, config_from_dict
from neox.model.build import SINGLE, build_decoder, fresh_weights
from neox.model.layers import Decoder, canonical_parameters
from neox.parallel.mesh import Mesh

SMALL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "padded_vocab_size": 512,
    # Wide enough that likelihoods differ well beyond rounding.
    "init_method_std": 0.3,
    "tokenizer_type": "CharLevelTokenizer",
    "train_micro_batch_size_per_gpu": 3,
}


def small_config(**changes: Any) -> Config:
    """The configuration with `changes`."""
    return config_from_dict(SMALL | changes, world_size=None)


def small_model(mesh: Mesh = SINGLE, **changes: Any) -> Decoder:
    """The model, or a rank's share of it, in eval mode."""
    config = small_config(**changes)
    return build_decoder(config.model, source=fresh_weights(config), mesh=mesh).eval()


def save_small(folder: Path, *, iteration: int = 7, **changes: Any) -> Path:
    """Write a native checkpoint of the model; return the folder of checkpoints."""
    config = small_config(**changes)
    tensors = {name: tensor.detach() for name, tensor in canonical_parameters(small_model(**changes)).items()}
    manifest = Manifest(
        progress=Progress(iteration=iteration),
        layout=Layout(1, 1, 1, 0),
        padded_vocab_size=config.model.padded_vocab_size or 0,
        precision="fp32",
        schedule={},
        optimizer=None,
        config=config.to_flat(),
        files={},
        tensors={},
    )
    stored = [StoredTensor("model", name, value) for name, value in tensors.items()]
    write_checkpoint(folder, iteration=iteration, tensors=stored, manifest=manifest, configs={}, team=Team())
    return folder


def naive_greedy(model: Decoder, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor]:
    """Tokens and their logits [count, V] by calling the whole model on one growing sequence."""
    tokens, logits = list(prompt), []
    with torch.no_grad():
        for _ in range(count):
            logits.append(model(torch.tensor([tokens]))[0, -1])
            tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(logits)


def as_dict(completion: Any) -> dict[str, Any]:
    """A completion without what varies from run to run."""
    fields = asdict(completion)
    del fields["duration_seconds"], fields["logits"]
    return fields
