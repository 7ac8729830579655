"""Folders as upstream GPT-NeoX writes them, of given weights, for tests."""

import json

import numpy as np
import torch
from golden_models import GOLDENS, read_golden

from neox.checkpoint.weights import weight_source
from neox.model.build import build_decoder
from neox.model.loss import Targets


def loss_of(model, tokens):
    tokens = torch.tensor(tokens)
    labels = tokens[:, 1:]
    return model(tokens[:, :-1], Targets(labels, torch.full(labels.shape, 1 / labels.numel())))


def largest_difference(reader, config, arrays):
    """Of logits, computed in float64, so that the rounding in the file is the only one."""
    model = build_decoder(config.model, source=weight_source(reader), dtype=torch.float64)
    logits = model(torch.from_numpy(arrays["tokens"])).detach().numpy()
    return np.abs(logits - arrays["logits"]).max()


def write_sequential(folder, by_rank, config=None, **state):
    """Write weights named `sequential.*` as upstream's sequential layout."""
    folder.mkdir(parents=True)
    for rank, weights in enumerate(by_rank):
        torch.save({"module": weights} | state, folder / f"mp_rank_{rank:02d}_model_states.pt")
    write_config(folder, config)


def write_pipeline(folder, by_rank, config=None):
    """Write weights named `sequential.*` as upstream's pipeline layout."""
    folder.mkdir(parents=True)
    for rank, weights in enumerate(by_rank):
        layers = {}
        for name, tensor in weights.items():
            _, index, local = name.split(".", 2)
            layers.setdefault(int(index), {})[local] = tensor
        for index, tensors in layers.items():
            torch.save(tensors, folder / f"layer_{index:02d}-model_{rank:02d}-model_states.pt")
    write_config(folder, config)


def write_config(folder, config):
    if config is not None:
        (folder / "configs").mkdir()
        (folder / "configs" / "model.yml").write_text(json.dumps(config.to_flat()))


def tp2_golden(name):
    """Configuration, arrays, and each rank's weights."""
    parts = [read_golden(GOLDENS / "tp2" / f"{name}.rank{rank}.npz") for rank in (0, 1)]
    return parts[0][0], parts[0][1], [weights for _, _, weights in parts]


def one_golden(name="pythia_like"):
    config, arrays, weights = read_golden(GOLDENS / "logits" / f"{name}.npz")
    return config, arrays, weights
