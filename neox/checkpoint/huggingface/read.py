"""Import of a folder that `transformers` wrote; a tensor at a time."""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.huggingface.detect import family_that_wrote
from neox.checkpoint.huggingface.files import (
    BIN,
    BIN_INDEX,
    INDEX,
    SINGLE,
    WeightFile,
    open_weights,
    read_index,
    read_json,
)
from neox.checkpoint.huggingface.gpt_neox import HEADS
from neox.checkpoint.huggingface.layouts import Layout
from neox.checkpoint.weights import check_shape, missing_tensor
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError
from neox.model.build import meta_decoder

BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|attn_mask)")
"""Names of what older versions saved although it follows from the settings."""


def is_huggingface(folder: Path) -> bool:
    """Whether a folder looks like a model of Hugging Face."""
    return (folder / "config.json").is_file()


class HuggingFaceReader:
    """Reads the folder of a model: safetensors or pickled weights, in one file or several.

    Attributes:
        folder: the folder with config.json.
        family: what config.json says it is.
        model_config: the model as this project describes it.

    Raises:
        CheckpointError: the folder holds another architecture, or its files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_json(folder / "config.json")
        self.family = family_that_wrote(content, folder / "config.json")
        self._keys = self.family.flat_keys(content, folder / "config.json")
        try:
            config = config_from_dict(self._keys | {"train_micro_batch_size_per_gpu": 1}, world_size=1)
        except ConfigError as error:
            problems = "; ".join(str(error).splitlines())
            raise CheckpointError(f"{folder / 'config.json'}: no model can be built from it: {problems}") from None
        self.model_config = config.model
        self._shapes = {name: tuple(p.shape) for name, p in meta_decoder(self.model_config).named_parameters()}
        self._files: dict[Path, WeightFile] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        return list(self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter as config.json gives it."""
        return dict(self._shapes)

    def config_keys(self) -> dict[str, Any]:
        """Flat YAML keys of the model."""
        return dict(self._keys)

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax."""
        return int(self._keys["padded_vocab_size"])

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter on the CPU, in the dtype of the file.

        Raises:
            CheckpointError: the folder has no such parameter, or one of another shape, or its file is damaged.
        """
        if name not in self._shapes:
            raise missing_tensor(self.folder, name)
        parts, layout = self._parts(name)
        return layout.join([file.tensor(theirs) for file, theirs in parts])

    def check_files(self) -> None:
        """See that there is every parameter, of the right shape, without reading one.

        Raises:
            CheckpointError: naming what is not as config.json says.
        """
        for name in self._shapes:
            self._parts(name)

    def _parts(self, name: str) -> tuple[list[tuple[WeightFile, str]], Layout]:
        """Files and names of what makes up a parameter, and how."""
        theirs, layout = self.family.locate(name, self.model_config)
        wanted = layout.split(torch.empty(self._shapes[name], device="meta"))
        return [self._find(part, tensor.shape) for part, tensor in zip(theirs, wanted, strict=True)], layout

    def _find(self, wanted: str, shape: torch.Size) -> tuple[WeightFile, str]:
        for spelling in self._spellings(wanted):
            if spelling in self._locations:
                file = self._open(self._locations[spelling])
                check_shape(file.path, spelling, file.shape(spelling), shape)
                return file, spelling
        raise CheckpointError(f"{self.folder}: has no tensor {wanted}; copy the whole folder")

    def _spellings(self, wanted: str) -> tuple[str, ...]:
        # Base models are saved without the prefix, and some writers use the name in memory of GPTNeoX's head.
        return HEADS if wanted in HEADS else (wanted, wanted.removeprefix(self.family.prefix))

    @cached_property
    def _locations(self) -> dict[str, Path]:
        """File of each tensor of the folder."""
        locations = self._listed()
        self._check_known(locations)
        return locations

    def _listed(self) -> dict[str, Path]:
        for index in (INDEX, BIN_INDEX):
            if (self.folder / index).is_file():
                return {name: self.folder / file for name, file in read_index(self.folder / index).items()}
        for name in (SINGLE, BIN):
            path = self.folder / name
            if path.is_file():
                return dict.fromkeys(self._open(path).names(), path)
        raise CheckpointError(f"{self.folder}: has a config.json and no model.safetensors; copy the whole folder")

    def _check_known(self, names: Iterable[str]) -> None:
        """Refuse tensors that the model does not have: it would compute something else without them."""
        known = set(HEADS)
        for name in self._shapes:
            for part in self.family.locate(name, self.model_config)[0]:
                known |= set(self._spellings(part))
        for name in names:
            if name not in known and BUFFERS.fullmatch(name) is None:
                raise CheckpointError(
                    f"{self.folder}: holds {name}, which a {self.family.architecture} of its config.json does not have"
                )

    def _open(self, path: Path) -> WeightFile:
        if path not in self._files:
            self._files[path] = open_weights(path)
        return self._files[path]
