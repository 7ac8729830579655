"""Rules of training: data, length of the run, checkpoints."""

import math
import re

from neox.config.data import DataConfig
from neox.config.preference import ComparisonConfig
from neox.config.problems import Problems
from neox.config.training import CheckpointConfig, TrainingConfig


def resolve_training(training: TrainingConfig, data: DataConfig, problems: Problems) -> TrainingConfig:
    """Check the length of the run and decide which parts of the data are evaluated."""
    if training.train_epochs is not None:
        if training.train_iters is not None:
            problems.add("train_epochs", "set together with train_iters; keep one of them")
        weights = set(data.train_data_weights or (1.0,))
        for key, clash in (
            ("weight_by_num_documents", data.weight_by_num_documents),
            ("train_data_weights", len(weights) > 1),
            ("pack_impl", data.pack_impl != "packed"),
        ):
            if clash:
                problems.add("train_epochs", f"one pass over the data is not defined with {key}; set train_iters")
    evaluates = training.eval_iters > 0
    given = training.model_fields_set
    return training.model_copy(update={name: evaluates for name in ("do_valid", "do_test") if name not in given})


def check_data(data: DataConfig, comparison: ComparisonConfig, problems: Problems, notices: list[str]) -> None:
    """Check that datasets, labels and weights go together."""
    if data.weighted_sampler_alpha != 1.0 and not data.weight_by_num_documents:
        notices.append("weighted_sampler_alpha has no effect: weight_by_num_documents is not set")
    lists = {split: getattr(data, f"{split}_data_paths") for split in ("train", "valid", "test")}
    named = [f"{split}_data_paths" for split, paths in lists.items() if paths]
    if data.data_path is not None and named:
        problems.add("data_path", f"set together with {named[0]}; keep one of them")
    for split, paths in lists.items():
        if named and not paths and data.data_path is None:
            problems.add(named[0], f"{split}_data_paths is missing; set all three lists, or data_path and split")
        for kind in ("label_data_paths", "data_weights"):
            extra = getattr(data, f"{split}_{kind}")
            listed = f"pos_{split}_data_paths" if comparison.is_pairwise else f"{split}_data_paths"
            sets = len(comparison.side("pos", split) if comparison.is_pairwise else paths or ())
            if extra is not None and len(extra) != sets:
                problems.add(f"{split}_{kind}", f"has {len(extra)} entries, and {listed} has {sets}")
        weights = getattr(data, f"{split}_data_weights") or (1.0,)
        if min(weights) < 0 or not 0 < sum(weights) < math.inf:
            problems.add(f"{split}_data_weights", f"expected weights of at least 0, not all 0, got {list(weights)}")
    _check_split(data.split, problems)


def _check_split(split: str, problems: Problems) -> None:
    parts = [part.strip() for part in re.split("[,/]", split)]
    if len(parts) > 3 or not all(re.fullmatch(r"\d+(\.\d*)?|\.\d+", part) for part in parts):
        problems.add("split", f"expected up to three proportions such as '969, 30, 1', got {split!r}")
    elif sum(map(float, parts)) == 0:
        problems.add("split", f"expected a proportion above 0, got {split!r}")


def check_checkpoint(checkpoint: CheckpointConfig, problems: Problems) -> None:
    """Check that it is said when to save."""
    factor = checkpoint.checkpoint_factor
    if checkpoint.save is not None and factor is None and not checkpoint.extra_save_iters:
        problems.add("save", "set without checkpoint_factor or extra_save_iters; add checkpoint_factor: 1000")
    if checkpoint.checkpoint_scale == "linear" and isinstance(factor, float):
        problems.add("checkpoint_factor", f"expected a whole number of iterations, got {factor!r}")
    if checkpoint.checkpoint_scale == "log" and factor is not None and factor <= 1:
        problems.add("checkpoint_factor", f"expected a ratio above 1 with checkpoint_scale log, got {factor!r}")
    if any(iteration < 0 for iteration in checkpoint.extra_save_iters):
        problems.add("extra_save_iters", f"expected iterations of at least 0, got {list(checkpoint.extra_save_iters)}")
    _check_places(checkpoint, problems)


def _check_places(checkpoint: CheckpointConfig, problems: Problems) -> None:
    """See that only `s3_path` is an address."""
    mends = {"save": "set s3_path to the address and save to a folder", "load": "copy it here first"}
    for key, mend in mends.items():
        place = getattr(checkpoint, key)
        if place is not None and place.startswith("s3://"):
            problems.add(key, f"a folder is needed, got {place}; {mend}")
    address = checkpoint.s3_path
    if address is not None and not re.match("s3://[^/]", address):
        problems.add("s3_path", f"expected s3://bucket/prefix, got {address!r}")
    if address is not None and checkpoint.save is None:
        problems.add("s3_path", "set without save, whose checkpoints would be uploaded; add save: checkpoints")
