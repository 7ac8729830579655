"""Rotary settings in config.json.

`transformers` 5 keeps them all in `rope_parameters`; version 4 reads `rope_theta` and `rope_scaling`, or for GPTNeoX
`rotary_emb_base` and `rotary_pct`. Both sets are written, either is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox.checkpoint.huggingface.fields import Field, dynamic_length
from neox.config import ModelConfig

SCALINGS = ("linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rotary(Field):
    """Base, rotated share of a head, and scaling.

    Attributes:
        base: their name of the base outside rope_parameters.
        share: their name of the rotated share outside rope_parameters; None for a family that rotates whole heads.
        default_share: the share where it is absent.
        default_base: the base where it is absent.
    """

    base: str = "rope_theta"
    share: str | None = None
    default_share: float = 1.0
    default_base: float = 10000

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        base, scaling = float(config.rotary_emb_base), dict(config.rope_scaling or {})
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
        older: dict[str, Any] = {self.base: base}
        if self.share:
            rope["partial_rotary_factor"] = older[self.share] = config.rotary_pct
        if scaling:
            older["rope_scaling"] = rope | scaling
        return {"rope_parameters": rope | scaling, **older}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        rope = _parameters(content)
        base = rope.pop("rope_theta", content.get(self.base, self.default_base))
        share = rope.pop("partial_rotary_factor", content.get(self.share, self.default_share)) if self.share else 1.0
        keys = {"pos_emb": "rotary", "rotary_emb_base": base, "rotary_pct": share}
        kind, trained, length = rope["rope_type"], "original_max_position_embeddings", "max_position_embeddings"
        if length in content and (kind == "dynamic" or (kind in ("yarn", "llama3") and trained not in rope)):
            rope[trained] = content[length]
        return keys | {"rope_scaling": rope if rope["rope_type"] != "default" else None}

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        if config.pos_emb != "rotary":
            return f"pos_emb: {config.pos_emb}; it has rotary positions only"
        if config.rotary_pct != 1 and not self.share:
            return f"rotary_pct: {config.rotary_pct:g}; it rotates whole heads"
        trained = dynamic_length(config)
        if trained and config.seq_length > trained:
            return (
                f"seq_length: {config.seq_length}; it stretches dynamic positions by the length of each prompt, "
                f"which is the same only up to original_max_position_embeddings {trained}"
            )
        return ""

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        rope = _parameters(content)
        if rope["rope_type"] not in ("default", *SCALINGS):
            known = ", ".join(SCALINGS)
            return f"rotary positions are of type {rope['rope_type']}; only default, {known} can be read"
        share = rope.get("partial_rotary_factor", content.get("partial_rotary_factor")) or 1
        if not self.share and share != 1:
            return f"partial_rotary_factor is {share}; only 1 can be read"
        return ""


def _parameters(content: Mapping[str, Any]) -> dict[str, Any]:
    # Where both are given, transformers takes the older key.
    rope = dict(content.get("rope_scaling") or content.get("rope_parameters") or {})
    kind = rope.pop("type", "default")
    rope.pop("finetuned", None)  # of the first models with yarn; it says how they were made
    given = {key: value for key, value in rope.items() if value is not None}
    return {"rope_type": given.pop("rope_type", kind), **given}
