"""Rules of the `elasticity` section, which sets the batch from the number of processes."""

from typing import Any

from neox.config.elasticity import Elasticity
from neox.config.keys import mismatch, number
from neox.config.optimization import BatchConfig
from neox.config.parallel import ParallelConfig
from neox.config.problems import Problems, did_you_mean

_KEY = "elasticity"
_KINDS: dict[str, Any] = {
    "enabled": bool,
    "max_train_batch_size": int,
    "micro_batch_sizes": list,
    "min_gpus": int,
    "max_gpus": int,
    "min_time": int,
    "prefer_larger_batch": bool,
    "ignore_non_elastic_batch_info": bool,
    "num_gpus_per_node": int,
    "model_parallel_size": int,
    "version": float,
}
_NAMED = 12
"""Numbers of processes that an error names, the nearest ones."""
_LARGEST = 10**9
_REQUIRED = ("max_train_batch_size", "micro_batch_sizes")
_REPLACED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def resolve_elasticity(
    batch: BatchConfig, parallel: ParallelConfig, problems: Problems, notices: list[str]
) -> BatchConfig:
    """Set the batch as the section says; leave it where there is none, or where it is not enabled."""
    section = batch.elasticity
    if not section:
        return batch
    if not _check_values(section, problems) or not section["enabled"]:
        return batch
    rule = _rule(section, parallel, problems)
    if rule is None or not _check_replaced(section, batch, problems, notices):
        return batch
    if section.get("min_time"):
        notices.append("elasticity.min_time has no effect: it is for what starts the processes")
    sizes: dict[str, int] = dict.fromkeys(_REPLACED, 0)
    if parallel.data_parallel_size is not None:
        sizes |= _sizes(rule, parallel, parallel.data_parallel_size, problems)
    elif not rule.by_node:
        sizes["train_batch_size"] = rule.batch(1).total
    return batch.model_copy(update=sizes)


def _check_values(section: dict[str, Any], problems: Problems) -> bool:
    """Check names, types and bounds; say whether nothing is wrong."""
    before = len(problems.lines)
    if "enabled" not in section:
        problems.add(f"{_KEY}.enabled", "not set; add enabled: true or enabled: false")
    for name, value in section.items():
        if name not in _KINDS:
            problems.add(f"{_KEY}.{name}", f"unknown key{did_you_mean(str(name), _KINDS) or '; remove it'}")
        elif wrong := mismatch(value, _KINDS[name]) or _out_of_bounds(name, value):
            problems.add(f"{_KEY}.{name}", wrong)
    for name in _REQUIRED:
        if section.get("enabled") is True and name not in section:
            problems.add(f"{_KEY}.{name}", "not set, and elasticity is enabled; add it")
    return len(problems.lines) == before


def _out_of_bounds(name: str, value: Any) -> str:
    if name == "micro_batch_sizes":
        fits = value and all(not mismatch(size, int) and 0 < size <= _LARGEST for size in value)
        return "" if fits else f"expected a list of whole numbers above 0, got {value!r}"
    if name == "version":
        return "" if number(value) in (0.1, 0.2) else f"expected 0.1 or 0.2, got {value!r}"
    if isinstance(value, bool):
        return ""
    if value > _LARGEST:
        return f"expected at most {_LARGEST}, got {value!r}"
    least = 0 if name == "min_time" else 1
    return "" if value >= least else f"expected at least {least}, got {value!r}"


def _rule(section: dict[str, Any], parallel: ParallelConfig, problems: Problems) -> Elasticity | None:
    """The section as a rule; None where its values do not go together."""
    before, replica = len(problems.lines), parallel.pipeline_stages * parallel.model_parallel_size
    rule = Elasticity(
        largest=int(section["max_train_batch_size"]),
        micro_batches=tuple(int(size) for size in section["micro_batch_sizes"]),
        least=int(section.get("min_gpus", 1)),
        most=int(section.get("max_gpus", 10000)),
        prefers_larger=section.get("prefer_larger_batch", True),
        per_node=int(section.get("num_gpus_per_node", replica)),
        replica=replica,
        by_node=number(section.get("version", 0.2)) == 0.2,
    )
    if rule.most < rule.least:
        problems.add(f"{_KEY}.max_gpus", f"{rule.most} is less than min_gpus {rule.least}; raise it")
    given = section.get("model_parallel_size", replica)
    if given not in (1, replica):
        problems.add(
            f"{_KEY}.model_parallel_size",
            f"{given} is not the {replica} processes of pipe_parallel_size x model_parallel_size; remove it",
        )
    if rule.by_node and rule.per_node % replica:
        problems.add(
            f"{_KEY}.num_gpus_per_node",
            f"{rule.per_node} is no multiple of the {replica} processes that hold one model; set a multiple",
        )
    elif max(rule.micro_batches) > (room := rule.room):
        problems.add(
            f"{_KEY}.micro_batch_sizes",
            f"{max(rule.micro_batches)} is more than max_train_batch_size leaves one rank, {room}; remove it",
        )
    return rule if len(problems.lines) == before else None


def _check_replaced(section: dict[str, Any], batch: BatchConfig, problems: Problems, notices: list[str]) -> bool:
    """Refuse sizes set beside the section, as DeepSpeed did; announce them where it is told to ignore them."""
    given = [name for name in _REPLACED if name in batch.model_fields_set]
    if given and not section.get("ignore_non_elastic_batch_info"):
        problems.add(
            given[0],
            "set together with elasticity, which sets the batch; remove it, or set "
            "elasticity.ignore_non_elastic_batch_info: true",
        )
        return False
    if given:
        verb = "has" if len(given) == 1 else "have"
        notices.append(f"{', '.join(given)} {verb} no effect: elasticity sets the batch")
    return True


def _sizes(rule: Elasticity, parallel: ParallelConfig, ranks: int, problems: Problems) -> dict[str, int]:
    """The three sizes for a number of data-parallel ranks; nothing where that number is not allowed."""
    found = rule.batch(ranks)
    micro = found.micro_batch(ranks, rule.micro_batches) if ranks in found.ranks else None
    if micro is None:
        nearest = sorted(found.ranks, key=lambda count: abs(count - ranks))[:_NAMED]
        processes = [str(count * rule.replica) for count in sorted(nearest) if count != ranks]
        choices = f"one of {', '.join(processes)}" if processes else "fewer, or raise max_train_batch_size"
        problems.add(
            f"{_KEY}.micro_batch_sizes",
            f"{list(rule.micro_batches)} up to max_train_batch_size {rule.largest} give no batch for "
            f"{parallel.world_size} processes; start {choices}",
        )
        return {}
    steps = found.total // (micro * ranks)
    return dict(zip(_REPLACED, (found.total, micro, steps), strict=True))
