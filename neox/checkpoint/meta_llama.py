"""Llama as Meta releases it: params.json and consolidated.NN.pth, one file for each model-parallel rank.

Differs from the format of Hugging Face, from whose table of Llama the rest is taken, in three things:

    names        layers.0.attention.wq.weight for model.layers.0.self_attn.q_proj.weight, and so on
    rotation     of neighbouring dimensions, (0, 1), (2, 3), ...; here of halves, (0, H/2), (1, H/2 + 1), ...
    shards       columns and rows as in Megatron-LM; the embedding by its width, from Llama 3 on by its vocabulary

Source: github.com/meta-llama/llama-models, models/llama3/model.py and args.py.
"""

import re
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint.huggingface.files import read_json
from neox.checkpoint.huggingface.layouts import SeparateQKV
from neox.checkpoint.huggingface.llama import LLAMA
from neox.checkpoint.storage.torch_file import TorchFile
from neox.checkpoint.upstream.parts import Flat, as_part, is_tensor
from neox.checkpoint.weight_map import LogicalTensor, weight_map
from neox.checkpoint.weights import check_shape, fields_of, missing_tensor
from neox.config import config_from_dict
from neox.errors import CheckpointError, ConfigError

PARAMS = "params.json"
_SHARD = re.compile(r"consolidated\.(\d+)\.pth")
_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
_ROTATED = (".wq.weight", ".wk.weight")
_COLUMNS = (*_ROTATED, ".wv.weight", ".w1.weight", ".w3.weight")
_ROWS = (".wo.weight", ".w2.weight")
_COMPUTED = ("rope.freqs",)
"""What follows from params.json."""
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def is_meta_llama(folder: Path) -> bool:
    """Whether a folder holds Meta's files."""
    return (folder / PARAMS).is_file() and bool(_shards(folder))


class MetaLlamaReader:
    """Reads Llama 1 to 3 as Meta releases them, whatever the number of files.

    Args:
        folder: the folder of one size, with params.json.

    Attributes:
        folder: as given.
        model_config: the model as this project describes it.

    Raises:
        CheckpointError: files are missing or damaged, or hold another architecture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._params = _read_params(folder / PARAMS)
        self._files = self._open()
        self._check_whole()
        try:
            with fields_of(folder / PARAMS, "Meta"):
                described = self._as_huggingface()
            self._keys = LLAMA.flat_keys(described, folder / PARAMS)
            config = config_from_dict(self._keys | {"train_micro_batch_size_per_gpu": 1}, world_size=None)
        except ConfigError as error:
            problems = "; ".join(str(error).splitlines())
            raise CheckpointError(f"{folder / PARAMS}: no model can be built from it: {problems}") from None
        self.model_config = config.model
        self._tensors: dict[str, LogicalTensor] = weight_map(config.model)
        self._check_known()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax."""
        return int(self._keys["padded_vocab_size"])

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        return list(self._tensors)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter as params.json and the files give it."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def config_keys(self) -> dict[str, Any]:
        """Flat YAML keys of the model."""
        return dict(self._keys)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a parameter on the CPU, in the dtype of the files.

        Raises:
            CheckpointError: the files have no such parameter, or one of another shape.
        """
        if name not in self._tensors:
            raise missing_tensor(self.folder, name)
        theirs, layout = LLAMA.locate(name, self.model_config)
        return layout.join([self._read(_meta_name(each)) for each in theirs])

    def check_files(self) -> None:
        """See that there is every parameter, of the right shape, without reading one.

        Raises:
            CheckpointError: naming what is not as params.json says.
        """
        for name, tensor in self._tensors.items():
            theirs, layout = LLAMA.locate(name, self.model_config)
            wanted = layout.split(torch.empty(tensor.shape, device="meta"))
            for each, part in zip(theirs, wanted, strict=True):
                check_shape(self.folder, _meta_name(each), self._shape(_meta_name(each)), part.shape)

    def _open(self) -> list[dict[str, Flat]]:
        paths = _shards(self.folder)
        if not paths:
            raise CheckpointError(f"{self.folder}: has no consolidated.*.pth; copy the whole folder")
        files = []
        for rank in range(1 + max(paths)):
            path = paths.get(rank, self.folder / f"consolidated.{rank:02d}.pth")
            content = TorchFile(path).content
            if not isinstance(content, dict) or "tok_embeddings.weight" not in content:
                raise CheckpointError(f"{path}: has no tok_embeddings.weight, so it is no Llama of Meta's")
            files.append({name: as_part(item) for name, item in content.items() if is_tensor(item)})
        return files

    def _check_whole(self) -> None:
        """See that no file is missing at the end."""
        rows, wanted = self._shape("layers.0.attention.wq.weight")[0], self._params["dim"]
        if rows != wanted:
            raise CheckpointError(
                f"{self.folder}: its {len(self._files)} files have {rows} rows of queries, {PARAMS} says {wanted}; "
                "copy the whole folder"
            )

    def _check_known(self) -> None:
        """Refuse tensors that the model does not have, it would compute something else, and files that disagree."""
        known = {_meta_name(each) for name in self._tensors for each in LLAMA.locate(name, self.model_config)[0]}
        for file in self._files:
            for name in file:
                if name not in known and name not in _COMPUTED:
                    raise CheckpointError(f"{self.folder}: holds {name}, which a Llama of its {PARAMS} does not have")
        for name in known if len(self._files) > 1 else ():
            if self._dimension(name) is None:
                first, *others = (part.read() for part in self._parts(name))
                if not all(torch.equal(first, other) for other in others):
                    raise CheckpointError(f"{self.folder}: its files differ in {name}, so they are not of one model")

    def _shape(self, name: str) -> tuple[int, ...]:
        """Whole shape of a tensor by its name in the files."""
        return tuple(
            sum(part.shape[d] for part in self._parts(name)) if d == self._dimension(name) else size
            for d, size in enumerate(self._parts(name)[0].shape)
        )

    def _parts(self, name: str) -> list[Flat]:
        for file in self._files:
            if name not in file:
                raise CheckpointError(f"{self.folder}: has no tensor {name}; copy the whole folder")
        return [file[name] for file in self._files]

    def _dimension(self, name: str) -> int | None:
        """The dimension that the files divide between them; None where each has the whole."""
        if name == "tok_embeddings.weight":
            return int(len(self._files) == 1 or self._files[0][name].shape[1] != self._params["dim"])
        if name == "output.weight" or name.endswith(_COLUMNS):
            return 0
        return 1 if name.endswith(_ROWS) else None

    def _read(self, name: str) -> torch.Tensor:
        parts, dimension = self._parts(name), self._dimension(name)
        if dimension is None or len(parts) == 1:
            whole = parts[0].read()
        else:
            whole = torch.cat([part.read() for part in parts], dim=dimension)
        return by_halves(whole, SeparateQKV.of(self.model_config).head_dim) if name.endswith(_ROTATED) else whole

    def _as_huggingface(self) -> dict[str, Any]:
        """The config.json that this model would have."""
        params, heads = self._params, self._params["n_heads"]
        tied = "output.weight" not in self._files[0]
        base, scaled = float(params.get("rope_theta") or 10000), bool(params.get("use_scaled_rope"))
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        if scaled:
            rope |= {
                "rope_type": "llama3",
                "factor": float(params.get("rope_scaling_factor") or 8),
                "low_freq_factor": 1.0,
                "high_freq_factor": float(params.get("high_freq_factor") or 4),
                "original_max_position_embeddings": 8192,
            }
        return {
            "model_type": "llama",
            "vocab_size": self._shape("tok_embeddings.weight")[0],
            "hidden_size": params["dim"],
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "intermediate_size": self._shape("layers.0.feed_forward.w1.weight")[0],
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "max_position_embeddings": params.get("max_seq_len") or _trained_length(params, base, scaled=scaled),
            "rope_parameters": rope,
            "tie_word_embeddings": tied,
            "dtype": _DTYPES.get(self._files[0]["norm.weight"].dtype, "float32"),
        }


def by_halves(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of queries or keys from rotated neighbours to rotated halves; weights [rows, D]."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _meta_name(theirs: str) -> str:
    """Meta's name of one of Hugging Face's."""
    module, _, kind = theirs.rpartition(".")
    prefix = ""
    if match := re.fullmatch(r"model\.(layers\.\d+\.)(.+)", module):
        prefix, module = match.groups()
    return f"{prefix}{_NAMES[module]}.{kind}"


def _trained_length(params: dict[str, Any], base: float, *, scaled: bool) -> int:
    """The context of the release, which params.json does not say but its other numbers give away."""
    if scaled:
        return 131072  # Llama 3.1 and later
    if base != 10000:
        return 8192 if base == 500000 else 16384  # Llama 3; Code Llama
    return 2048 if params.get("norm_eps") == 1e-6 else 4096  # Llama 1; Llama 2


def _shards(folder: Path) -> dict[int, Path]:
    matches = ((_SHARD.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in sorted(matches, key=lambda item: item[1]) if match}


def _read_params(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the folder of one model of Meta's")
    content = read_json(path)
    missing = [name for name in ("dim", "n_layers", "n_heads") if not isinstance(content.get(name), int)]
    if missing:
        raise CheckpointError(f"{path}: has no {missing[0]}, so it is no Llama of Meta's")
    if content.get("moe_args") or "vision_chunk_size" in content:
        raise CheckpointError(f"{path}: describes experts or a vision model; only dense text models can be read")
    return content
