"""Which class of transformers a model belongs to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neox.checkpoint.huggingface.bloom import BLOOM
from neox.checkpoint.huggingface.falcon import FALCON
from neox.checkpoint.huggingface.family import Family
from neox.checkpoint.huggingface.gpt2 import GPT2
from neox.checkpoint.huggingface.gpt_neox import GPT_NEOX
from neox.checkpoint.huggingface.llama import LLAMA, MISTRAL
from neox.checkpoint.huggingface.mixtral import MIXTRAL
from neox.checkpoint.huggingface.opt import OPT
from neox.config import ModelConfig
from neox.errors import CheckpointError

FAMILIES = {family.name: family for family in (GPT_NEOX, LLAMA, MISTRAL, MIXTRAL, FALCON, OPT, BLOOM, GPT2)}
"""By the name that `--architecture` takes; the first that can express a model is the one it is exported to."""


def family_of(config: ModelConfig, architecture: str | None = None) -> Family:
    """Find the family that expresses a model.

    Args:
        config: the model.
        architecture: a name in FAMILIES to use, or None for the first that can.

    Raises:
        CheckpointError: none can, or the named one cannot; names the key that stands in the way, of the
            nearest family.
    """
    if config.has_reward_head:
        raise CheckpointError("train_impl: rm: a reward model cannot be exported to Hugging Face; it stays as it is")
    fitting = [family for family in FAMILIES.values() if not family.obstacles(config)]
    if architecture is not None:
        obstacles = FAMILIES[architecture].obstacles(config)
        if not obstacles:
            return FAMILIES[architecture]
        mend = f"; export it as {fitting[0].name}" if fitting else ""
        raise CheckpointError(f"cannot be exported as {architecture}: {obstacles[0]}{mend}")
    if fitting:
        return fitting[0]
    nearest = min(FAMILIES.values(), key=lambda family: len(family.obstacles(config)))
    raise CheckpointError(
        f"cannot be exported to Hugging Face: {nearest.obstacles(config)[0]}, and no class there is nearer"
    )


def family_that_wrote(content: Mapping[str, Any], path: Path) -> Family:
    """Find the family of a config.json.

    Raises:
        CheckpointError: it is another architecture; `path` is named.
    """
    known = {family.model_type: family for family in FAMILIES.values()}
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(f"{path}: model_type is {kind}; only {', '.join(known)} can be read")
    return known[kind]
