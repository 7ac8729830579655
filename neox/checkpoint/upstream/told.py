"""What the tensors of a checkpoint of GPT-NeoX tell of its model, where no configuration lies beside them.

The rest of the model (its residual, activation, rotated share, epsilons) leaves no trace in names or shapes.
"""

from collections.abc import Mapping
from typing import Any

from neox.checkpoint.upstream.reader import UpstreamReader

_BLOCK = "layers.2."
_NORMS = {"scale": "rmsnorm", "g": "scalenorm", "bias": "layernorm"}
"""By a parameter that no other norm has; TransformerEngine's rmsnorm has a weight alone."""
_POSITIONS = {
    "layers.0.position_embeddings.weight": "learned",
    "layers.0.position_embeddings.inv_freq": "sinusoidal",
    f"{_BLOCK}attention.rotary_emb.inv_freq": "rotary",
    f"{_BLOCK}attention.alibi_embed.slopes": "alibi",
}


def told_by_tensors(reader: UpstreamReader) -> dict[str, Any]:
    """Flat keys of the model; those that cannot be known are absent."""
    shapes = reader.shapes()
    rows, hidden = shapes["layers.0.word_embeddings.weight"]
    found: dict[str, Any] = {
        "padded_vocab_size": rows,
        "num_layers": sum(name.endswith(".attention.dense.weight") for name in shapes),
        "hidden_size": hidden,
        "use_bias_in_attn_linear": f"{_BLOCK}attention.dense.bias" in shapes,
        "use_bias_in_mlp": f"{_BLOCK}mlp.linear2.bias" in shapes,
        **_heads(reader.arguments, shapes),
        **_width(shapes),
        **_norms(shapes),
    }
    heads = [name for name in shapes if name.endswith(("final_linear.weight", "rm_linear.weight"))]
    if not any(name.endswith("rm_linear.weight") for name in heads):  # beside which the other head is not kept
        found["no_weight_tying"] = bool(heads)
    positions = [kind for name, kind in _POSITIONS.items() if name in reader.files.weights[0]]
    if positions:
        found["pos_emb"] = positions[0]
    if positions == ["learned"]:
        found["max_position_embeddings"] = shapes["layers.0.position_embeddings.weight"][0]
    return found


def _heads(arguments: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Heads of queries, which only GPT-NeoX's own record of sizes has, and those of keys."""
    heads = arguments.get("num_attention_heads")
    if not isinstance(heads, int):
        return {}
    rows, hidden = shapes[f"{_BLOCK}attention.query_key_value.weight"]
    return {"num_attention_heads": heads, "num_kv_heads": heads * (rows - hidden) // (2 * hidden)}


def _width(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    inner = shapes[f"{_BLOCK}mlp.linear2.weight"][1]
    is_gated = shapes[f"{_BLOCK}mlp.linear1.weight"][0] != inner
    return {"intermediate_size": 3 * inner if is_gated else inner}


def _norms(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    prefix = f"{_BLOCK}input_layernorm."
    kinds = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    if not kinds:
        return {"norm": "non_parametric_layernorm"}
    norms = [norm for kind, norm in _NORMS.items() if kind in kinds]
    found = {"use_qk_layernorm": any(".qk_layernorm." in name for name in shapes)}
    return found | ({"norm": norms[0]} if norms else {})
