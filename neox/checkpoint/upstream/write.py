"""Writing weights as GPT-NeoX itself would have saved them, at any tensor and pipeline size.

The files and what `mp_rank_*` holds are described in `upstream_files`. Only weights are written: there is no optimizer
state, so GPT-NeoX loads such a folder with `finetune: true`, or with `no_load_optim: true` to go on counting.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from neox.checkpoint.native.commit import begin, commit, discard
from neox.checkpoint.native.lineage import check_vacant
from neox.checkpoint.storage.ahead import read_ahead
from neox.checkpoint.storage.memory import return_freed
from neox.checkpoint.storage.progress import progress_bar
from neox.checkpoint.storage.torch_archive import TorchFileWriter
from neox.checkpoint.upstream.state import rank_state
from neox.checkpoint.weight_map import Kind, LogicalTensor, weight_map
from neox.checkpoint.weights import WeightReader, weight_source
from neox.config import Config, ModelConfig, config_from_dict
from neox.config.schema import places
from neox.data.tokenizers import build_tokenizer, padded_vocab_size
from neox.errors import CheckpointError, UserError
from neox.files import write_whole
from neox.model.build import DTYPES, in_dtype
from neox.parallel.splits import pad_rows, take_shard

LEGACY_NAMES = {"mlp.linear1": ("mlp.dense_h_to_4h",), "mlp.linear2": ("mlp.dense_4h_to_h",)}
LEGACY_GATED_NAMES = {"mlp.linear1": ("mlp.w3", "mlp.w1"), "mlp.linear2": ("mlp.w2",)}
"""Names of before 2024-09; of a gated MLP w3 is up, w1 the gate, and both are kept apart."""

MISSING_FEATURES = {"embedding_norm": False, "rope_scaling": None}
"""Keys that change a model and that GPT-NeoX does not have, with the value that changes nothing."""


@dataclass(frozen=True)
class UpstreamLayout:
    """How GPT-NeoX lays out a checkpoint.

    Attributes:
        pipe: its `pipe_parallel_size`; 0 is the sequential layout, one file a tensor rank.
        tensor: its `model_parallel_size`.
        legacy: names of before 2024-09, as the released 20B and Pythia have them.
    """

    pipe: int = 0
    tensor: int = 1
    legacy: bool = False


@dataclass(frozen=True)
class _Part:
    """Files, one of each tensor rank, that are written together, and the tensors in them."""

    files: tuple[str, ...]
    tensors: tuple[LogicalTensor, ...]


class UpstreamWriter:
    """Writes one `global_step<N>` folder.

    Args:
        weights: the trained weights.
        config: the model they belong to, with its tokenizer.
        layout: what to write.
        iteration: of the training run, for the name of the folder and for GPT-NeoX to go on counting.
        samples: training sequences read so far.

    Raises:
        CheckpointError: GPT-NeoX has no such model, or had none at the time of the legacy names.
        ConfigError: the model does not divide by the sizes of the layout.
    """

    def __init__(
        self, weights: WeightReader, config: Config, *, layout: UpstreamLayout, iteration: int = 0, samples: int = 0
    ) -> None:
        self._weights = weights
        self._read = weight_source(weights)
        self._layout = layout
        self._iteration = iteration
        self._samples = samples
        _check_expressible(config.model, layout)
        self._config = _at_layout(config, layout, rows=weights.padded_vocab_size)
        self._model = self._config.model
        self._dtype = DTYPES[self._model.precision]
        self._map = weight_map(self._model)

    def files(self) -> dict[str, int]:
        """Bytes of the tensors of each file that will be written; what describes them comes on top."""
        sizes = {}
        for part in self._parts():
            for rank, file in enumerate(part.files):
                meta = (tensor for logical in part.tensors for tensor in self._announced(logical, rank).values())
                sizes[file] = sum(tensor.nbytes for tensor in meta)
        return sizes | dict.fromkeys((name for name in self._rank_files() if name not in sizes), 0)

    def write(self, root: Path) -> Path:
        """Write the folder, and let `latest` name it; each tensor is read once, and one is in memory at a time.

        Returns:
            The folder.

        Raises:
            CheckpointError: the weights do not fit the configuration, or there are checkpoints in `root`.
        """
        check_vacant(root)
        final = root / f"global_step{self._iteration}"
        try:
            folder = begin(final)
            try:
                self._write_files(folder)
                commit(folder, final)
            finally:
                discard(folder)
        except OSError as error:
            raise CheckpointError(f"{error.filename or final}: cannot be written ({error.strerror or error})") from None
        return final

    def _write_files(self, folder: Path) -> None:
        sizes = {name: tensor.shape.numel() * self._dtype.itemsize for name, tensor in self._map.items()}
        tensors = read_ahead((name, self._whole(self._map[name])) for name in progress_bar(sizes, sizes, "writing"))
        for part in self._parts():
            self._write_part(folder, part, tensors)
        next(tensors, None)  # ends the bar
        if self._layout.pipe:
            for rank, name in enumerate(self._rank_files()):
                with TorchFileWriter(folder / name, self._state(rank, module=None)):
                    pass
        write_whole(folder / "configs" / "model.yml", yaml.safe_dump(_description(self._config), sort_keys=False))

    def _write_part(self, folder: Path, part: _Part, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        with ExitStack() as stack:
            writers = [
                stack.enter_context(TorchFileWriter(folder / file, self._content(part, rank)))
                for rank, file in enumerate(part.files)
            ]
            for logical in part.tensors:
                name, whole = next(tensors)
                assert name == logical.name, "parts follow the order of the map"
                for rank, writer in enumerate(writers):
                    writer.write_all(self._share(logical, whole, rank).values())
                del whole
                return_freed()

    def _whole(self, logical: LogicalTensor) -> torch.Tensor:
        """A tensor of the source, in the type and with the rows that it will have."""
        whole = in_dtype(logical.name, self._read(logical.name, self._stored_shape(logical)), self._dtype)
        return pad_rows(whole, logical.shape[0]) if logical.kind is Kind.VOCABULARY else whole

    def _parts(self) -> Iterator[_Part]:
        tensors = tuple(self._map.values())
        ranks = range(self._layout.tensor)
        if not self._layout.pipe:
            yield _Part(self._rank_files(), tensors)
            return
        for index in dict.fromkeys(tensor.layer for tensor in tensors):
            files = tuple(f"layer_{index:02d}-model_{rank:02d}-model_states.pt" for rank in ranks)
            yield _Part(files, tuple(tensor for tensor in tensors if tensor.layer == index))

    def _rank_files(self) -> tuple[str, ...]:
        """One file of each tensor rank of each stage, tensor ranks fastest."""
        number = self._layout.tensor * max(1, self._layout.pipe)
        return tuple(f"mp_rank_{rank:02d}_model_states.pt" for rank in range(number))

    def _content(self, part: _Part, rank: int) -> Any:
        """What a rank's file holds, with tensors on the meta device where they will come."""
        tensors = [(logical, self._announced(logical, rank)) for logical in part.tensors]
        if self._layout.pipe:
            return {name: tensor for _, shares in tensors for name, tensor in shares.items()}
        module = OrderedDict(
            (f"sequential.{logical.layer}.{name}", tensor)
            for logical, shares in tensors
            for name, tensor in shares.items()
        )
        return self._state(rank, module=module)

    def _announced(self, logical: LogicalTensor, rank: int) -> dict[str, torch.Tensor]:
        return self._share(logical, torch.empty(logical.shape, dtype=self._dtype, device="meta"), rank)

    def _share(self, logical: LogicalTensor, whole: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
        """What a rank holds of a tensor, by names within the layer."""
        size = self._layout.tensor
        share = take_shard(logical.name, whole, rank=rank, size=size, groups=logical.groups)
        if logical.kind is Kind.ROW_BIAS and self._model.gpt_j_residual and size > 1:
            share = share / size  # each rank adds its own before the reduction
        module, _, kind = logical.local.rpartition(".")
        names: tuple[str, ...] = (module,)
        if self._layout.legacy:
            names = (LEGACY_GATED_NAMES if self._model.is_gated else LEGACY_NAMES).get(module, names)
        return {f"{name}.{kind}": part for name, part in zip(names, share.chunk(len(names)), strict=True)}

    def _stored_shape(self, logical: LogicalTensor) -> torch.Size:
        """The shape in the source, whose vocabulary may be padded less."""
        if logical.kind is not Kind.VOCABULARY:
            return logical.shape
        return torch.Size((self._weights.padded_vocab_size, *logical.shape[1:]))

    def _state(self, rank: int, *, module: Any) -> dict[str, Any]:
        return rank_state(
            self._config,
            module=module,
            tensor_rank=rank % self._layout.tensor,
            iteration=self._iteration,
            samples=self._samples,
        )


def _at_layout(config: Config, layout: UpstreamLayout, *, rows: int) -> Config:
    """The configuration by which GPT-NeoX finds the files to be of the sizes that it computes.

    It rounds the tokenizer's size up to a multiple of make_vocab_size_divisible_by times the tensor-parallel size. Rows
    are added where that needs them, and never taken away. Where it would give another number, as for a model that was
    padded otherwise, the key is set to the rows of a rank, which always gives this one.
    """
    size = max(1, layout.tensor)
    multiple = config.model.make_vocab_size_divisible_by
    was_padded_so = rows % multiple == 0
    padded = padded_vocab_size(rows, divisible_by=multiple if was_padded_so else 1, model_parallel_size=size)
    tokens = _vocabulary(config)
    if not tokens or padded_vocab_size(tokens, divisible_by=multiple, model_parallel_size=size) != padded:
        multiple = padded // size
    keys = _description(config) | {
        "pipe_parallel_size": layout.pipe,
        "model_parallel_size": layout.tensor,
        "make_vocab_size_divisible_by": multiple,
        "padded_vocab_size": padded,
        "precision": config.model.precision,
        "seed": config.training.seed,
        "train_micro_batch_size_per_gpu": 1,
    }
    return config_from_dict(keys, world_size=None)


def _vocabulary(config: Config) -> int:
    """Tokens of the tokenizer; 0 where its files are not at hand."""
    try:
        return build_tokenizer(config.tokenizer).vocab_size
    except UserError:
        return 0


def _check_expressible(model: ModelConfig, layout: UpstreamLayout) -> None:
    if model.has_reward_head:
        raise CheckpointError("train_impl: rm; a reward model is not written as GPT-NeoX has it, use --format native")
    for key, value in MISSING_FEATURES.items():
        if getattr(model, key) != value:
            raise CheckpointError(f"{key}: {getattr(model, key)}; GPT-NeoX has no such model, use --format native")
    if model.has_experts:
        raise CheckpointError(
            f"moe_num_experts: {model.moe_num_experts}; GPT-NeoX keeps the experts of a rank in one matrix, which is "
            "not written here; use --format native"
        )
    if layout.legacy and model.is_grouped:
        raise CheckpointError(
            f"num_kv_heads: {model.num_kv_heads}; GPT-NeoX ordered shared heads otherwise in the days of the legacy "
            "names; leave --legacy_names out"
        )


def _description(config: Config) -> dict[str, Any]:
    """Keys of the model, the tokenizer and the layout, as GPT-NeoX names them."""
    known = {place.key for section in ("model", "tokenizer") for place in places(section)}
    known |= {"pipe_parallel_size", "model_parallel_size"}
    known -= {"padded_vocab_size", "compile", *MISSING_FEATURES}
    known -= {key for key in known if key.startswith("moe_")}
    return {key: value for key, value in config.to_flat().items() if key in known}
