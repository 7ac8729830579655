"""DeepSpeed's own reading of the settings that it will get, tried beforehand: what it refuses becomes one line."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from neox.config import Config, deepspeed_dict
from neox.config.problems import Problems

_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


class _OneRank:
    """A process grid of one, since the batch of all ranks was checked before."""

    def get_data_parallel_world_size(self) -> int:
        """Ranks that divide the batch."""
        return 1


def check_settings(config: Config) -> None:
    """Check that DeepSpeed can read its configuration; needs no process group and leaves nothing behind.

    Raises:
        ConfigError: with one line for each section, or field of one, that DeepSpeed refuses.
    """
    settings = deepspeed_dict(config)
    settings["train_batch_size"] = settings[_BATCH[1]] * settings[_BATCH[2]]
    if _refusal(settings) is None:
        return
    problems, base = Problems(config.sources), {key: settings.pop(key) for key in _BATCH}
    for key, value in settings.items():
        refusal = _refusal(base | {key: value})
        if refusal is not None:
            is_extra = key in (config.deepspeed.deepspeed_extra_args or {})
            place = f"deepspeed_extra_args.{key}" if is_extra else key
            for field, reason in _fields(base, key, value, refusal):
                problems.add(f"{place}.{field}" if field else place, f"DeepSpeed refuses it: {reason}")
    if not problems.lines:
        together = _refusal(base | settings)
        problems.add("deepspeed_extra_args", f"DeepSpeed refuses the sections together: {_reason(together)}")
    problems.raise_any()


def _fields(base: dict[str, Any], key: str, value: Any, refusal: Exception) -> Iterator[tuple[str, str]]:
    """What is wrong inside a section: names of fields with reasons; an empty name for the whole section."""
    if isinstance(refusal, ValidationError):
        for detail in refusal.errors(include_url=False, include_context=False):
            field = ".".join(str(step) for step in detail["loc"])
            yield field, f"{detail['msg']}, got {detail['input']!r}"
        return
    alone = {}
    if isinstance(value, dict):
        alone = {field: _refusal(base | {key: {field: inside}}) for field, inside in value.items()}
    named = [(field, _reason(reason)) for field, reason in alone.items() if reason is not None]
    if len(named) == 1:
        yield named[0]
    elif isinstance(refusal, AttributeError | TypeError):
        yield "", f"it has no use for {value!r}"
    else:
        yield "", _reason(refusal)


def _refusal(settings: dict[str, Any]) -> Exception | None:
    """What DeepSpeed's reader raises for these settings."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        with _silence():
            DeepSpeedConfig(dict(settings), mpu=_OneRank())
    except (DeepSpeedConfigError, ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        return error
    return None


def _reason(error: Exception | None) -> str:
    """An exception's text on one line."""
    if isinstance(error, KeyError):
        return f"{error} is missing; add it"
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _silence() -> Iterator[None]:
    """Without DeepSpeed's remarks, which come once more when the engine starts."""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
