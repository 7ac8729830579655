"""Rows of the tables that say how config.json and our keys name the same thing.

A row writes their keys from a model, reads ours from a config.json, and says what stands in the way of either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neox.config import ModelConfig

REQUIRED = object()
"""Default of a key that every config.json has."""


class Field:
    """A row; the base class is one that says nothing."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Their keys for the model."""
        return {}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Our keys for a config.json; one with the value None is not set."""
        return {}

    def obstacle(self, config: ModelConfig) -> str:
        """Why the family cannot express the model, `key: value; what it needs`; empty if it can."""
        return ""

    def objection(self, content: Mapping[str, Any]) -> str:
        """Why a config.json cannot be read; empty if it can."""
        return ""


@dataclass(frozen=True)
class Plain(Field):
    """The same value under two names.

    Attributes:
        theirs: their key.
        ours: our key.
        default: theirs where the key is absent.
        also: older names of their key.
    """

    theirs: str
    ours: str
    default: Any = REQUIRED
    also: tuple[str, ...] = ()

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: getattr(config, self.ours)}

    def found(self, content: Mapping[str, Any]) -> Any:
        """Their value."""
        return next((content[key] for key in (self.theirs, *self.also) if key in content), self.default)

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        return {self.ours: self.found(content)}

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        missing = self.default is REQUIRED and self.found(content) in (None, REQUIRED)
        return f"has no {self.theirs}; the file is not whole, copy it again" if missing else ""


class Opposite(Plain):
    """A switch that means the contrary: tie_word_embeddings is not no_weight_tying."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: not getattr(config, self.ours)}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        return {self.ours: not self.found(content)}


class Biases(Plain):
    """One switch for the biases of both halves of a block."""

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        return dict.fromkeys(("use_bias_in_attn_linear", "use_bias_in_mlp"), self.found(content))

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        if config.use_bias_in_attn_linear == config.use_bias_in_mlp:
            return ""
        return f"use_bias_in_mlp: {_yaml(config.use_bias_in_mlp)}; it has biases in attention and MLP, or in neither"


@dataclass(frozen=True)
class Always(Field):
    """A key of ours that the family has with one value only."""

    ours: str
    value: Any

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        return {self.ours: self.value}

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        value = getattr(config, self.ours)
        return "" if value == self.value else f"{self.ours}: {_yaml(value)}; it has {_yaml(self.value)} only"


@dataclass(frozen=True)
class Only(Field):
    """A key of theirs that can be read with one value only.

    Attributes:
        theirs: their key.
        value: the value that is written.
        default: theirs where the key is absent.
    """

    theirs: str
    value: Any
    default: Any

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: self.value}

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        found = content.get(self.theirs, self.default)
        return "" if found == self.value else f"{self.theirs} is {found}; only {self.value} can be read"


@dataclass(frozen=True)
class Positions(Field):
    """The longest sequence; `offset` rows of our table of positions come before the first one.

    Where rotary positions follow the length (`dynamic`), theirs is the length trained on.
    """

    theirs: str = "max_position_embeddings"
    default: int = 2048
    offset: int = 0

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: (dynamic_length(config) or config.max_position_embeddings) - self.offset}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        length = content.get(self.theirs, self.default)
        return {"seq_length": length, "max_position_embeddings": length + self.offset}


@dataclass(frozen=True)
class Activation(Field):
    """The nonlinearity of an MLP without a gate; two of our keys for one of theirs."""

    theirs: str = "hidden_act"
    default: str = "gelu"

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        tanh = config.activation == "gelu" and config.bias_gelu_fusion
        return {self.theirs: TANH_GELUS[0] if tanh else _PLAIN_NAMES[config.activation]}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        name = content.get(self.theirs, self.default)
        kind = "gelu" if name in TANH_GELUS else name
        return {"activation": kind, "bias_gelu_fusion": name in TANH_GELUS}

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        known = config.activation in _PLAIN_NAMES
        return "" if known else f"activation: {config.activation}; it has {', '.join(_PLAIN_NAMES)} only"

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        name, known = content.get(self.theirs, self.default), (*_PLAIN_NAMES, *TANH_GELUS)
        return "" if name in known else f"{self.theirs} is {name}; only {', '.join(known)} can be read"


@dataclass(frozen=True)
class GatedActivation(Field):
    """The nonlinearity of the gate."""

    theirs: str = "hidden_act"

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: _GATED_NAMES[config.activation]}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        return {"activation": _gated(content.get(self.theirs, "silu"))}

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        known = config.activation in _GATED_NAMES
        return "" if known else f"activation: {config.activation}; it has {', '.join(_GATED_NAMES)} only"

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        name, known = content.get(self.theirs, "silu"), (*_GATED_NAMES.values(), "swish")
        return "" if name in known else f"{self.theirs} is {name}; only {', '.join(known)} can be read"


@dataclass(frozen=True)
class Width(Field):
    """The inner width of the MLP, which our key names before a gate takes two thirds of it (once for each half).

    Attributes:
        theirs: their key; None for a family where it follows from the hidden size.
        gated: whether the MLP has a gate.
        multiple: the width where the key is absent, as a multiple of the hidden size; 0 if it never is.
    """

    theirs: str | None = "intermediate_size"
    gated: bool = False
    multiple: int = 0

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {self.theirs: config.mlp_inner_width} if self.theirs else {}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        width = self._found(content)
        return {"intermediate_size": 3 * width if self.gated else width}

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        width = self.multiple * config.hidden_size
        if self.theirs or config.mlp_inner_width == width:
            return ""
        return f"intermediate_size: {config.intermediate_size}; it has {self.multiple} x hidden_size only"

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        return "" if self._found(content) else f"has no {self.theirs}; the file is not whole, copy it again"

    def _found(self, content: Mapping[str, Any]) -> int:
        given = content.get(self.theirs) if self.theirs else None
        hidden = next((content[key] for key in ("hidden_size", "n_embd", "n_embed") if content.get(key)), 0)
        return int(given or self.multiple * hidden)


class AllHeads(Field):
    """Every head has keys and values of its own; config.json has no key for it."""

    def obstacle(self, config: ModelConfig) -> str:
        """See Field."""
        return f"num_kv_heads: {config.num_kv_heads}; it has num_attention_heads only" if config.is_grouped else ""


@dataclass(frozen=True)
class Window(Field):
    """The sliding window: theirs counts the key of the query itself, ours only those before it.

    Attributes:
        default: theirs where the key is absent.
    """

    default: int | None = 4096

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        width = config.sliding_window_width
        return {"sliding_window": None if width is None else width + 1}

    def read(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """See Field."""
        width = content.get("sliding_window", self.default)
        return {"sliding_window_width": None if width is None else width - 1}

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        width = content.get("sliding_window")
        return "" if width is None or width > 1 else f"sliding_window is {width}; only 2 or more can be read"


class HeadSize(Field):
    """The size of a head, which follows from the hidden size here."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """See Field."""
        return {"head_dim": config.head_dim}

    def objection(self, content: Mapping[str, Any]) -> str:
        """See Field."""
        size, heads = content.get("head_dim"), content.get("num_attention_heads") or 1
        width = content.get("hidden_size") or 0
        if size is None or size * heads == width:
            return ""
        return f"head_dim is {size}; only hidden_size / num_attention_heads, {width / heads:g}, can be read"


def dynamic_length(config: ModelConfig) -> int:
    """Length beyond which `dynamic` rotary positions are stretched; 0 for a model without."""
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") != "dynamic":
        return 0
    return int(scaling.get("original_max_position_embeddings", config.max_position_embeddings))


TANH_GELUS = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")
"""Names in transformers of the tanh approximation; the first is the one that is written."""

_PLAIN_NAMES = {"gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "swish", "mish": "mish"}
_GATED_NAMES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "glu": "sigmoid", "bilinear": "linear"}


def _gated(name: str) -> str:
    """Our name of a gated activation."""
    return {theirs: ours for ours, theirs in _GATED_NAMES.items()}.get("silu" if name == "swish" else name, name)


def _yaml(value: Any) -> str:
    """A value as people write it in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
