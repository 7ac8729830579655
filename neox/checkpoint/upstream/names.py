"""What GPT-NeoX has called the parameters of a layer over the years, and what they are called here.

Today's names are ours. Until September 2024 the matrices of the MLP were dense_h_to_4h and dense_4h_to_h, and those of
a gated one three of their own, w1 (gate), w3 (up) and w2 (down). With TransformerEngine they are fc1_weight,
attention.qkv.weight and so on, and the norm before the MLP is in it.
"""

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum

from neox.checkpoint.upstream.parts import Part, Stacked
from neox.errors import CheckpointError

_LEGACY = {"mlp.dense_h_to_4h": "mlp.linear1", "mlp.dense_4h_to_h": "mlp.linear2", "mlp.w2": "mlp.linear2"}
_GATE, _UP = "mlp.w1.", "mlp.w3."
_TRANSFORMER_ENGINE = {
    "mlp.fc1_weight": "mlp.linear1.weight",
    "mlp.fc1_bias": "mlp.linear1.bias",
    "mlp.fc2_weight": "mlp.linear2.weight",
    "mlp.fc2_bias": "mlp.linear2.bias",
    "mlp.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.layer_norm_bias": "post_attention_layernorm.bias",
    "attention.qkv.weight": "attention.query_key_value.weight",
    "attention.qkv.bias": "attention.query_key_value.bias",
    "attention.qkv.layer_norm_weight": "input_layernorm.weight",
    "attention.qkv.layer_norm_bias": "input_layernorm.bias",
    "attention.proj.weight": "attention.dense.weight",
    "attention.proj.bias": "attention.dense.bias",
}

_EXPERTS = ("mlp.router.", "mlp.experts.")

_BUFFERS = (
    "attention.rotary_emb.inv_freq",
    "position_embeddings.inv_freq",
    "attention.alibi_embed.slopes",
    "_extra_state",
)
"""Ends of the names of what is no parameter."""

_KNOWN = re.compile(
    r"word_embeddings\.weight|position_embeddings\.weight|final_linear\.weight|rm_linear\.weight"
    r"|(norm|input_layernorm|post_attention_layernorm|attention\.qk_layernorm)\.(weight|bias|scale|g)"
    r"|attention\.(query_key_value|dense)\.(weight|bias)|mlp\.linear[12]\.(weight|bias)"
)


class Dialect(StrEnum):
    """Who named the parameters of a checkpoint."""

    TODAY = "today"
    LEGACY = "until September 2024"
    TRANSFORMER_ENGINE = "TransformerEngine"


def dialect_of(names: Iterable[str]) -> Dialect:
    """Recognise the names in a file, `layers.<index>.<name>`."""
    locals_ = {_local(name) for name in names}
    if locals_ & set(_TRANSFORMER_ENGINE):
        return Dialect.TRANSFORMER_ENGINE
    old = {name for name in locals_ if name.startswith((*_LEGACY, _GATE, _UP))}
    return Dialect.LEGACY if old else Dialect.TODAY


def is_buffer(name: str) -> bool:
    """Whether a name in a file is of something computed, which has no parameter."""
    return name.endswith(_BUFFERS)


def translate(tensors: Mapping[str, Part], source: object) -> dict[str, Part]:
    """Give today's names to the parameters of one rank, `layers.<index>.<name>`, in the same order.

    Args:
        tensors: name in the file -> part; buffers are left out.
        source: the file or folder, for errors.

    Raises:
        CheckpointError: there is what is no part of a GPT-NeoX decoder.
    """
    found: dict[str, Part] = {}
    for name, part in tensors.items():
        index, local = name.split(".")[1], _local(name)
        whole = part
        if is_buffer(name) or local.startswith(_UP):
            continue
        if local.startswith(_GATE):
            up = name.replace(_GATE, _UP)
            if up not in tensors:
                raise CheckpointError(f"{source}: layer {index} holds {local} and no {_local(up)}; copy it again")
            local, whole = local.replace(_GATE, "mlp.linear1."), Stacked((tensors[up], part))
        else:
            local = _modern(local)
        if local == "post_attention_layernorm.weight" and f"layers.{index}.input_layernorm.scale" in tensors:
            local = "post_attention_layernorm.scale"
        if _KNOWN.fullmatch(local) is None:
            kinds = "(a norm, fused query_key_value, two-matrix MLP)"
            mend = "; of models with experts only Hugging Face's Mixtral can be" if local.startswith(_EXPERTS) else ""
            raise CheckpointError(
                f"{source}: layer {index} holds {local}; only GPT-NeoX layers {kinds} can be read{mend}"
            )
        if f"layers.{index}.{local}" in found:
            raise CheckpointError(f"{source}: layer {index} holds {local} twice, under an old name too; copy it again")
        found[f"layers.{index}.{local}"] = whole
    return found


def _local(name: str) -> str:
    return name.split(".", 2)[2]


def _modern(local: str) -> str:
    if local in _TRANSFORMER_ENGINE:
        return _TRANSFORMER_ENGINE[local]
    module, _, kind = local.rpartition(".")
    return f"{_LEGACY.get(module, module)}.{kind}"
