"""What a run that is taken up again promises: what differs from the checkpoint, what goes on exactly, what does not."""

import json
from collections.abc import Iterator
from typing import Any

from neox.checkpoint.native.manifest import Layout, Manifest
from neox.checkpoint.runs import RunReader
from neox.config import Config, config_from_dict, named_datasets
from neox.config.schema import places
from neox.errors import ConfigError
from neox.secrets import masked_values
from neox.training.origin import Origin
from neox.training.provenance import provenance

_UNTOLD_SECTIONS = ("logging", "generation", "evaluation", "launch")
_UNTOLD = (
    *("load", "load_fallback", "finetune", "no_load_optim", "no_load_rng", "save", "iteration", "padded_vocab_size"),
    *("pipe_parallel_size", "model_parallel_size", "zero_optimization.stage"),
)
"""Keys without influence on what is computed, those that the line on the layout tells, and one that must be equal."""
_ORDER = (
    *("seed", "seq_length", "split", "pack_impl", "allow_chopped", "weight_by_num_documents"),
    *("weighted_sampler_alpha", "train_data_weights"),
)
"""Keys that the order of samples is drawn from, beside the data and the number of samples."""
_AMOUNT = ("train_iters", "train_epochs", "train_batch_size")
_NONE = "not set"


def told(config: Config, origin: Origin | None) -> Iterator[str]:
    """What a run should say of where it starts.

    Args:
        config: what is asked for, with its number of processes.
        origin: the checkpoint that it starts from, None where there is none.
    """
    if origin is not None:
        yield from contract(config, origin.run) if origin.run else filter(None, [origin.remark])
    elif config.checkpoint.load is not None:
        yield f"load {config.checkpoint.load}: no checkpoint there yet, starting from fresh weights"


def contract(config: Config, run: RunReader) -> list[str]:
    """Lines that tell what becomes of a run: how far it had come, what differs, what stays exact and what does not.

    Args:
        config: what is asked for now, with its number of processes.
        run: the checkpoint.
    """
    saved, now = run.manifest, provenance(config)
    changed = dict(_changed_keys(config, saved))
    data = _changed_data(config, saved, now)
    progress = saved.progress
    lines = [f"resume {run.folder}: iteration {progress.iteration}, {progress.consumed_samples} samples consumed"]
    lines += [f"  differs: {line}" for line in (*_layout_and_code(config, saved, now), *data)]
    lines += [f"  differs: {key}: {before} -> {after}" for key, (before, after) in changed.items()]
    exact, other = _promises(config, run, changed, data)
    lines.append(f"  exact: {', '.join(exact)}")
    lines += [f"  not exact: {line}" for line in other]
    return lines


def planned_layout(config: Config) -> Layout:
    """The grid that a configuration asks for, as a checkpoint records it."""
    parallel = config.parallel
    assert parallel.data_parallel_size is not None, "the number of processes is known"
    return Layout(
        pipe_parallel_size=parallel.pipeline_stages,
        data_parallel_size=parallel.data_parallel_size,
        model_parallel_size=parallel.model_parallel_size,
        zero_stage=parallel.zero_stage,
    )


def _layout_and_code(config: Config, saved: Manifest, now: dict[str, Any]) -> Iterator[str]:
    layout = planned_layout(config)
    if layout != saved.layout:
        yield f"layout: {_grid(saved.layout)} -> {_grid(layout)}"
    if saved.precision != config.model.precision:
        yield f"precision: {saved.precision} -> {config.model.precision}"
    before = saved.environment
    if not before:
        yield "code, packages and data: not recorded in the checkpoint"
        return
    for name, version in now["packages"].items():
        old = before["packages"].get(name)
        if old != version:
            yield f"{name}: {old or _NONE} -> {version or _NONE}"
    if before["commit"] != now["commit"]:
        yield f"code: {before['commit'] or 'not recorded'} -> {now['commit'] or 'not recorded'}"


def _grid(layout: Layout) -> str:
    sizes = layout.pipe_parallel_size, layout.data_parallel_size, layout.model_parallel_size
    return "pipeline {} x data {} x tensor {}, ZeRO {}".format(*sizes, layout.zero_stage)


def _changed_data(config: Config, saved: Manifest, now: dict[str, Any]) -> list[str]:
    """Datasets whose content is not what it was; where the same files are makes no difference."""
    if not saved.environment:
        return []
    before, after = saved.environment["data"], now["data"]
    prefixes = named_datasets(config)
    return [
        f"{place}: {_content(before.get(place))} -> {_content(after.get(place))}"
        + (f" ({prefixes[place]})" if place in prefixes else "")
        for place in sorted(before.keys() | after.keys())
        if before.get(place) != after.get(place)
    ]


def _content(fingerprint: dict[str, Any] | None) -> str:
    if fingerprint is None:
        return _NONE
    return f"{fingerprint['tokens_bytes']} bytes of tokens, index {fingerprint['index_hash'][:8]}"


def _changed_keys(config: Config, saved: Manifest) -> Iterator[tuple[str, tuple[str, str]]]:
    """Keys that either sets, whose values as they run are not the same; and the batch, which the processes set too."""
    before, after = _flatten(saved.config), _flatten(masked_values(config.given))
    resolved_before, resolved_after = _resolved(saved), _flatten(masked_values(config.to_flat(resolved=True)))
    untold = {place.key for section in _UNTOLD_SECTIONS for place in places(section)} | {*_UNTOLD, "precision"}
    batch = {"train_batch_size"} & resolved_before.keys()
    for key in sorted(before.keys() | after.keys() | batch):
        if key in untold or key.startswith("lora.") or key.endswith("data_path") or "_data_paths" in key:
            continue
        old, new = resolved_before.get(key, before.get(key)), resolved_after.get(key, after.get(key))
        if old != new:
            yield key, (_text(old), _text(new))


def _resolved(saved: Manifest) -> dict[str, Any]:
    """The settings that the run of a checkpoint ran with; empty where they cannot be told any more."""
    layout = saved.layout
    processes = layout.pipe_parallel_size * layout.data_parallel_size * layout.model_parallel_size
    try:
        return _flatten(config_from_dict(saved.config, world_size=processes).to_flat(resolved=True))
    except ConfigError:
        return {}


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys with values as JSON has them, as those of a checkpoint are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            found[f"{prefix}{key}"] = json.loads(json.dumps(value, default=str))
    return found


def _text(value: Any) -> str:
    return _NONE if value is None else json.dumps(value)


def _promises(config: Config, run: RunReader, changed: dict[str, Any], data: list[str]) -> tuple[list[str], list[str]]:
    """What goes on exactly, and a line for each thing that does not."""
    saved, settings = run.manifest, config.checkpoint
    same_layout = planned_layout(config) == saved.layout
    exact, other = ["iteration", "learning rate"], []
    if "optimizer" in {key.partition(".")[0] for key in changed} or not _same_schedule(config, changed):
        exact.remove("learning rate")
        other.append("learning rate: it goes on at the saved step of the schedule that is configured now")
    rounded = saved.precision == "fp32" != config.model.precision
    exact.append("fp32 master weights" if rounded else "weights")
    if settings.no_load_optim:
        other.append("optimizer: starts afresh (no_load_optim)")
    else:
        exact.append("optimizer state")
    order = _order(config, changed, data)
    exact, other = (exact, [*other, order]) if order else ([*exact, "order of samples"], other)
    dropout = _dropout(config, run, same_layout=same_layout)
    exact, other = (exact, [*other, dropout]) if dropout else ([*exact, "random numbers"], other)
    if not same_layout or rounded or saved.precision != config.model.precision:
        other.append("sums: added up in another order or precision, equal to rounding")
    return exact, other


def _same_schedule(config: Config, changed: dict[str, Any]) -> bool:
    schedule = {place.key for place in places("schedule")}
    return not schedule & changed.keys() or config.schedule.use_checkpoint_lr_scheduler


def _order(config: Config, changed: dict[str, Any], data: list[str]) -> str:
    """Why samples may come in another order; empty where they come in the same."""
    is_packed = config.data.pack_impl == "packed" and not config.preference.is_on
    drawn = [key for key in changed if key in (_ORDER if is_packed else (*_ORDER, *_AMOUNT))]
    if data or drawn:
        what = ", ".join(drawn) or "the data"
        return f"order of samples: {what} changed, so samples may come again or be left out"
    amount = [key for key in changed if key in _AMOUNT]
    if amount:
        return f"order of samples: the same if the data are passed as many times with the new {', '.join(amount)}"
    return ""


def _dropout(config: Config, run: RunReader, *, same_layout: bool) -> str:
    """Why dropout draws other numbers; empty where it draws the same or there is none."""
    if config.model.hidden_dropout == config.model.attention_dropout == config.lora.dropout == 0.0:
        return ""
    if config.checkpoint.no_load_rng:
        return "dropout: new random streams (no_load_rng)"
    if not same_layout:
        return "dropout: new random streams, as the layout is another"
    return "" if "rng/0" in run else "dropout: new random streams, as the checkpoint has none that can be used"
