"""Rules of what grows during a run: the length of sequences and the size of the batch."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from neox.config.keys import mismatch, number, whole_number
from neox.config.model import ModelConfig
from neox.config.optimization import BatchConfig
from neox.config.parallel import ParallelConfig
from neox.config.problems import Problems, did_you_mean
from neox.config.training import TrainingConfig

_KEY = "curriculum_learning"
_ENTRIES = ("enabled", "curriculum_type", "min_difficulty", "max_difficulty", "schedule_type", "schedule_config")
_SCHEDULES = {
    "fixed_linear": ("total_curriculum_step", "difficulty_step"),
    "fixed_root": ("total_curriculum_step", "difficulty_step", "root_degree"),
    "fixed_discrete": ("difficulty", "max_step"),
}


def check_curriculum(
    training: TrainingConfig, model: ModelConfig, parallel: ParallelConfig, problems: Problems
) -> None:
    """Check every entry of `curriculum_learning`, and that each length it gives is one that can be trained on."""
    entries = training.curriculum_learning
    if entries is None:
        return
    wrong = mismatch(entries.get("enabled"), bool)
    if "enabled" not in entries:
        wrong = "not set; add enabled: true or enabled: false"
    if wrong:
        problems.add(f"{_KEY}.enabled", wrong)
    if wrong or not entries["enabled"]:
        return
    if entries.get("curriculum_type") != "seqlen":
        problems.add(f"{_KEY}.curriculum_type", f"expected 'seqlen', {_got(entries, 'curriculum_type')}")
    kind, schedule = entries.get("schedule_type"), entries.get("schedule_config")
    if not isinstance(kind, str) or kind not in _SCHEDULES:
        choices = " or ".join(map(repr, _SCHEDULES))
        problems.add(f"{_KEY}.schedule_type", f"expected {choices}, {_got(entries, 'schedule_type')}")
    elif not isinstance(schedule, dict):
        problems.add(
            f"{_KEY}.schedule_config",
            f"expected a mapping with {' and '.join(_SCHEDULES[kind])}, {_got(entries, 'schedule_config')}",
        )
    elif _check_names(entries, kind, problems) and _check_range(entries, model, problems):
        size = parallel.model_parallel_size if parallel.sequence_parallel else 1
        check = _check_discrete if kind == "fixed_discrete" else _check_root
        check(entries, schedule, size, problems)


def _got(entries: Mapping[str, Any], name: str) -> str:
    return f"got {entries[name]!r}" if name in entries else "and it is not set; add it"


def _check_names(entries: Mapping[str, Any], kind: str, problems: Problems) -> bool:
    """Check that nothing is missing and nothing unknown; say whether that is so."""
    before = len(problems.lines)
    groups = ((_KEY, entries, _ENTRIES), (f"{_KEY}.schedule_config", entries["schedule_config"], _SCHEDULES[kind]))
    for where, given, known in groups:
        for name in given:
            if name not in known:
                problems.add(f"{where}.{name}", f"unknown entry{did_you_mean(str(name), known) or '; remove it'}")
        for name in known:
            if given.get(name) is None and name != "curriculum_type":  # that was looked at before
                problems.add(f"{where}.{name}", f"required with schedule_type {kind}; add it")
    return len(problems.lines) == before


def _check_range(entries: Mapping[str, Any], model: ModelConfig, problems: Problems) -> bool:
    """Check the shortest and the longest sequence; say whether they are right."""
    before = len(problems.lines)
    for name in ("min_difficulty", "max_difficulty"):
        _check_count(f"{_KEY}.{name}", entries[name], problems)
    if len(problems.lines) == before:
        shortest, longest = entries["min_difficulty"], entries["max_difficulty"]
        if shortest > longest:
            problems.add(f"{_KEY}.min_difficulty", f"{shortest} is above max_difficulty {longest}; lower it")
        if longest > model.seq_length:
            problems.add(
                f"{_KEY}.max_difficulty", f"{longest} is above seq_length {model.seq_length}; set it to that or less"
            )
    return len(problems.lines) == before


def _check_root(entries: Mapping[str, Any], schedule: Mapping[str, Any], size: int, problems: Problems) -> None:
    where = f"{_KEY}.schedule_config"
    before = len(problems.lines)
    for name in ("total_curriculum_step", "difficulty_step"):
        _check_count(f"{where}.{name}", schedule[name], problems)
    degree = schedule.get("root_degree", 1)
    if wrong := mismatch(degree, float):
        problems.add(f"{where}.root_degree", wrong)
    elif not 0.1 <= number(degree) <= 100:
        problems.add(f"{where}.root_degree", f"expected a number from 0.1 to 100, got {degree!r}")
    if len(problems.lines) > before:
        return
    if schedule["difficulty_step"] > entries["max_difficulty"]:
        problems.add(
            f"{where}.difficulty_step",
            f"{schedule['difficulty_step']} is above max_difficulty {entries['max_difficulty']}; lower it",
        )
    for name, value in (
        (f"{where}.difficulty_step", schedule["difficulty_step"]),
        (f"{_KEY}.max_difficulty", entries["max_difficulty"]),
    ):
        _check_division(name, value, size, problems)


def _check_discrete(entries: Mapping[str, Any], schedule: Mapping[str, Any], size: int, problems: Problems) -> None:
    where = f"{_KEY}.schedule_config"
    lengths, steps = schedule["difficulty"], schedule["max_step"]
    before = len(problems.lines)
    for name, values in (("difficulty", lengths), ("max_step", steps)):
        if not isinstance(values, list | tuple) or any(_count_message(value) for value in values):
            problems.add(f"{where}.{name}", f"expected a list of integers above 0, got {values!r}")
        elif any(after < value for value, after in pairwise(values)):
            problems.add(f"{where}.{name}", f"expected numbers that do not fall, got {list(values)}")
    if len(problems.lines) > before:
        return
    if len(lengths) != len(steps) + 1:
        problems.add(
            f"{where}.max_step",
            f"has {len(steps)} entries for {len(lengths)} in difficulty; give one less, the last length has no end",
        )
    for length in lengths:
        if not entries["min_difficulty"] <= length <= entries["max_difficulty"]:
            problems.add(
                f"{where}.difficulty",
                f"{length} is not from min_difficulty {entries['min_difficulty']} to max_difficulty "
                f"{entries['max_difficulty']}; change one of them",
            )
        _check_division(f"{where}.difficulty", length, size, problems)


def _check_division(name: str, value: int, size: int, problems: Problems) -> None:
    if value % size:
        problems.add(
            name, f"{value} is not divisible by model_parallel_size {size}, as sequence_parallel needs; change one"
        )


def _check_count(name: str, value: Any, problems: Problems) -> None:
    if wrong := _count_message(value):
        problems.add(name, wrong)


def _count_message(value: Any) -> str:
    wrong = mismatch(value, int)
    return wrong or ("" if whole_number(value) > 0 else f"expected more than 0, got {value!r}")


def check_ramp(batch: BatchConfig, parallel: ParallelConfig, training: TrainingConfig, problems: Problems) -> None:
    """Check `rampup_batch_size`, and that every size on the way is a whole number of micro-batches."""
    ramp = batch.rampup_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        problems.add(
            "rampup_batch_size", f"expected [first batch, increment, samples], three integers above 0, got {list(ramp)}"
        )
        return
    if training.train_epochs is not None:
        problems.add("rampup_batch_size", "one pass over the data is not defined with it; set train_iters")
    start, increment, _ = ramp
    full, micro, ranks = batch.train_batch_size, batch.train_micro_batch_size_per_gpu, parallel.data_parallel_size
    if not full:
        return
    if start >= full or (full - start) % increment:
        problems.add(
            "rampup_batch_size",
            f"{start} does not grow to train_batch_size {full} in steps of {increment}; change one of them",
        )
        return
    if not (micro and ranks):
        return
    # Where these two are multiples, so are all between them and the full batch.
    wrong = next((size for size in (start, start + increment) if size % (micro * ranks)), None)
    if wrong is not None:
        problems.add(
            "rampup_batch_size",
            f"its batch of {wrong} is not a multiple of train_micro_batch_size_per_gpu {micro} x data-parallel size "
            f"{ranks} = {micro * ranks}; make the first batch and the increment multiples of it",
        )
