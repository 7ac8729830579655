"""The files of one `global_step<N>` folder as upstream GPT-NeoX writes it.

Two layouts hold the weights:

    mp_rank_<rank>_model_states.pt            sequential: one a tensor rank; `module` -> `sequential.<i>.<name>`
    layer_<i>-model_<rank>-model_states.pt    pipeline: one a layer and tensor rank; `<name>`

and in both `mp_rank_*` holds the rest: arguments, iteration, optimizer, random-number states.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.unpickle import load_torch_file
from neox.errors import CheckpointError

Shards = list[torch.Tensor]
"""A parameter's parts by tensor rank."""

LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
ZERO3_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"

# Names of before 2024-09 and of today.
RENAMED = {"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2"}
BUFFERS = ("attention.rotary_emb.inv_freq", "position_embeddings.inv_freq", "attention.alibi_embed.slopes")
KNOWN = re.compile(
    r"word_embeddings\.weight|position_embeddings\.weight|final_linear\.weight"
    r"|(norm|input_layernorm|post_attention_layernorm|attention\.qk_layernorm)\.(weight|bias|scale|g)"
    r"|attention\.(query_key_value|dense)\.(weight|bias)|mlp\.linear[12]\.(weight|bias)"
)


def is_upstream(folder: Path) -> bool:
    """Whether a folder holds upstream's files."""
    return any(folder.glob("*mp_rank_*_model_states.pt")) or any(layer_files(folder))


def layer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """Files of the pipeline layout by layer and tensor rank, in that order."""
    matches = ((LAYER_FILE.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted(((int(m[1]), int(m[2])), path) for m, path in matches if m))


class SequentialFiles:
    """The layout of `pipe_parallel_size: 0`.

    Attributes:
        ranks: tensor-parallel size of the run.
    """

    def __init__(self, folder: Path) -> None:
        paths = {int(m[1]): p for p in folder.iterdir() if (m := RANK_FILE.fullmatch(p.name))}
        self.ranks = len(paths)
        self._modules = []
        for rank in range(self.ranks):
            path = paths.get(rank, folder / f"mp_rank_{rank:02d}_model_states.pt")
            self._modules.append(_module(path))

    def layers(self) -> Iterator[tuple[int, dict[str, Shards]]]:
        """Index and parameters of each layer, in order."""
        indices = dict.fromkeys(int(name.split(".")[1]) for name in self._modules[0])
        for index in indices:
            prefix = f"sequential.{index}."
            yield index, _collect([_below(module, prefix) for module in self._modules])


class PipelineFiles:
    """The layout of `pipe_parallel_size` 1 and more.

    Attributes:
        ranks: tensor-parallel size of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = layer_files(folder)
        self.ranks = 1 + max(rank for _, rank in self._files)

    def layers(self) -> Iterator[tuple[int, dict[str, Shards]]]:
        """Index and parameters of each layer, in order."""
        for index in dict.fromkeys(index for index, _ in self._files):
            names = [f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for rank in range(self.ranks)]
            paths = [self._files.get((index, rank), self._folder / name) for rank, name in enumerate(names)]
            yield index, _collect([load_torch_file(path) for path in paths])


def open_files(folder: Path) -> SequentialFiles | PipelineFiles:
    """Open the weights of a folder in whichever layout it is.

    Raises:
        CheckpointError: it is in a layout that cannot be read.
    """
    if (folder / ZERO3_FILE).is_file():
        raise CheckpointError(
            f"{folder}: weights are split by ZeRO 3, which cannot be read; save them again at ZeRO 2 or lower"
        )
    if any(layer_files(folder)):
        return PipelineFiles(folder)
    return SequentialFiles(folder)


def _module(path: Path) -> dict[str, torch.Tensor]:
    state = load_torch_file(path)
    module = state.get("module") if isinstance(state, dict) else None
    if not module or not all(re.match(r"sequential\.\d+\.", name) for name in module):
        raise CheckpointError(
            f"{path}: holds no weights named sequential.<layer>.<name>, and there are no layer_* files beside it; "
            "copy the whole folder"
        )
    return dict(module)


def _below(module: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in module.items() if name.startswith(prefix)}


def _collect(by_rank: list[dict[str, Any]]) -> dict[str, Shards]:
    """Today's name -> parts, from each rank's tensors under the names of the file."""
    return {_modern(name): [tensors[name] for tensors in by_rank] for name in by_rank[0] if not name.endswith(BUFFERS)}


def _modern(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name
