"""Import of a folder that `transformers` wrote; a tensor at a time."""

import logging
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.huggingface.detect import family_that_wrote
from neox.checkpoint.huggingface.files import (
    BIN_INDEX,
    INDEX,
    WeightFile,
    open_weights,
    read_index,
    read_json,
    weights_in,
)
from neox.checkpoint.huggingface.gpt_neox import HEADS
from neox.checkpoint.huggingface.layouts import Layout
from neox.checkpoint.weights import check_shape, missing_tensor
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError
from neox.model.build import meta_decoder
from neox.model.layers import EMBEDDING_INDEX

BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|attn_mask)")
"""Names of what older versions saved although it follows from the settings."""

ADAPTER = "adapter_config.json"
_EMBEDDING = f"layers.{EMBEDDING_INDEX}.word_embeddings.weight"

logger = logging.getLogger(__name__)


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
        CheckpointError: the folder holds another architecture, a quantised model or an adapter, or its files are
            missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_json(folder / "config.json")
        _check_whole_model(folder, content)
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
        self._compared: set[str] = set()

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
            CheckpointError: the folder has no such parameter, or one of another shape, or two that differ, or its
                file is damaged.
        """
        if name not in self._shapes:
            raise missing_tensor(self.folder, name)
        parts, layout = self._parts(name)
        self._check_copies(name)
        return layout.join([file.tensor(theirs) for file, theirs in parts])

    def check_files(self) -> None:
        """See that there is every parameter, of the right shape; of those that are there twice, that both are equal.

        Nothing else is read.

        Raises:
            CheckpointError: naming what is not as config.json says.
        """
        for name in self._shapes:
            self._parts(name)
        for name in self._shapes:
            self._check_copies(name)

    def _parts(self, name: str) -> tuple[list[tuple[WeightFile, str]], Layout]:
        """Files and names of what makes up a parameter, and how."""
        theirs, layout = self.family.locate(name, self.model_config)
        wanted = layout.split(torch.empty(self._shapes[name], device="meta"))
        return [self._find(part, tensor.shape) for part, tensor in zip(theirs, wanted, strict=True)], layout

    def _find(self, wanted: str, shape: torch.Size) -> tuple[WeightFile, str]:
        for spelling in self._held(wanted):
            file = self._open(self._locations[spelling])
            check_shape(file.path, spelling, file.shape(spelling), shape)
            return file, spelling
        if wanted in HEADS:
            raise CheckpointError(
                f"{self.folder}: has no tensor {wanted}, and its config.json does not tie the head to the embedding; "
                "copy the whole folder, or set tie_word_embeddings there if they are one"
            )
        raise CheckpointError(f"{self.folder}: has no tensor {wanted}; copy the whole folder")

    def _check_copies(self, name: str) -> None:
        """Refuse two tensors for one parameter whose numbers differ: each of them would be another model."""
        for wanted in self.family.locate(name, self.model_config)[0]:
            if wanted in self._compared:
                continue
            first, *others = self._held(wanted)
            for other in others:
                if not _same(self._stored(first), self._stored(other)):
                    raise CheckpointError(self._difference(first, other))
            self._compared.add(wanted)

    def _stored(self, spelling: str) -> torch.Tensor:
        return self._open(self._locations[spelling]).tensor(spelling)

    def _difference(self, first: str, other: str) -> str:
        if other in HEADS and first not in HEADS:
            return (
                f"{self.folder / 'config.json'}: ties the head to the embedding (tie_word_embeddings), but {other} is "
                f"not {first}; set tie_word_embeddings to false there, as transformers runs the model"
            )
        return f"{self.folder}: {first} and {other} are one parameter and differ; remove the wrong one"

    def _held(self, wanted: str) -> list[str]:
        """Under which names the folder holds a tensor: all are the same one."""
        return [spelling for spelling in self._spellings(wanted) if spelling in self._locations]

    def _spellings(self, wanted: str) -> tuple[str, ...]:
        # Base models are saved without the prefix, and some writers use the name in memory of GPTNeoX's head.
        if wanted in HEADS:
            return HEADS
        plain = tuple(dict.fromkeys((wanted, wanted.removeprefix(self.family.prefix))))
        is_tied = not self.model_config.no_weight_tying
        return plain + HEADS if is_tied and wanted == self._their_embedding else plain

    @cached_property
    def _their_embedding(self) -> str:
        return self.family.locate(_EMBEDDING, self.model_config)[0][0]

    @cached_property
    def _locations(self) -> dict[str, Path]:
        """File of each tensor of the folder."""
        locations = self._listed()
        self._check_known(locations)
        return locations

    def _listed(self) -> dict[str, Path]:
        """The file of each tensor, of the weights that transformers reads where there are several."""
        found = weights_in(self.folder)
        if not found:
            raise CheckpointError(f"{self.folder}: has a config.json and no model.safetensors; copy the whole folder")
        first, *others = found
        for other in others:
            if Path(first).suffixes[0] == Path(other).suffixes[0]:
                logger.warning("%s: %s is read, as transformers does, and %s is not", self.folder, first, other)
        if first not in (INDEX, BIN_INDEX):
            path = self.folder / first
            return dict.fromkeys(self._open(path).names(), path)
        return self._listed_in_parts(self.folder / first)

    def _listed_in_parts(self, index: Path) -> dict[str, Path]:
        """What the files of an index hold; transformers reads all that is in them, listed or not."""
        listed = {name: self.folder / file for name, file in read_index(index).items()}
        found: dict[str, Path] = {}
        for path in dict.fromkeys(listed.values()):
            for name in self._open(path).names():
                if name in found:
                    raise CheckpointError(
                        f"{path}: holds {name}, and so does {found[name].name}; copy the folder again"
                    )
                found[name] = path
        return listed | found

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


def _check_whole_model(folder: Path, content: Mapping[str, Any]) -> None:
    """Refuse what is not read as transformers would: a model that is more, or less, than its tensors."""
    quantised = content.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise CheckpointError(
            f"{folder / 'config.json'}: the model is quantised ({method or 'quantization_config'}); "
            "use its release in bf16, fp16 or fp32"
        )
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder / ADAPTER}: the folder also holds an adapter of PEFT, which is not read; "
            "merge it into the model (merge_and_unload), or remove it"
        )


def _same(first: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal, in the shorter of their types."""
    dtype = min(first.dtype, other.dtype, key=lambda kind: kind.itemsize)
    return torch.equal(first.to(dtype), other.to(dtype))
