"""Keys of GPT-NeoX's configurations that it no longer has, in the terms of today's.

fp16.type bfloat16    what bf16 was before there was a section for it
mlp_type llama        until September 2024: the gated MLP of w1, w2 and w3, which has no biases; `activation` is that
of the gate, and `intermediate_size`, which may be absent, the width after it
"""

from typing import Any

from neox.config.model import precision_name

_GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}


def in_todays_keys(values: dict[str, Any], *, inner_width: int) -> dict[str, Any]:
    """Flat keys of a saved configuration as GPT-NeoX has them today.

    Args:
        values: as saved.
        inner_width: columns of the second matrix of the MLP in the checkpoint.
    """
    found, section = dict(values), values.get("fp16")
    if isinstance(section, dict) and precision_name(section.get("type")) == "bfloat16":
        found |= {"fp16": None, "bf16": {"enabled": section.get("enabled", True)}}
    if found.pop("mlp_type", None) == "llama":
        activation = found.get("activation", "gelu")
        found |= {"activation": _GATED.get(activation, activation), "use_bias_in_mlp": False}
        found |= {"intermediate_size": 3 * inner_width}
    return found
