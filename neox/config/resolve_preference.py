"""Rules of training on preferences and rewards: which objective needs which data, and what it cannot run with."""

from typing import NamedTuple

from neox.config.data import SPLITS, DataConfig
from neox.config.generation import GenerationConfig
from neox.config.lora import LoraConfig
from neox.config.optimization import BatchConfig
from neox.config.parallel import ParallelConfig
from neox.config.preference import ComparisonConfig, PreferenceConfig
from neox.config.problems import Problems
from neox.config.training import TrainingConfig

_DATASET = {"dpo": "pairwise", "rm": "pairwise", "kto": "gpt2", "reinforce": "online", "normal": "gpt2"}
_OF_OBJECTIVE = {
    "dpo": ("dpo_beta", "dpo_fp32", "dpo_reference_free"),
    "kto": ("kto_beta", "kto_fp32", "kto_desirable_weight", "kto_undesirable_weight"),
    "rm": ("z_loss",),
    "reinforce": ("fp32_reinforce", "kl_impl", "kl_div_beta", "reinforce_leave_one_out"),
}


class Surroundings(NamedTuple):
    """The sections that an objective must get on with."""

    data: DataConfig
    batch: BatchConfig
    parallel: ParallelConfig
    training: TrainingConfig
    generation: GenerationConfig
    lora: LoraConfig


def check_preference(
    preference: PreferenceConfig,
    comparison: ComparisonConfig,
    around: Surroundings,
    problems: Problems,
    notices: list[str],
) -> None:
    """Check that the objective has its data, and note keys that it does not use."""
    _check_dataset(preference, comparison, problems)
    generation = around.generation
    writes_scores = generation.text_gen_type == "precompute"
    _note_unused(preference, generation.precompute_model_name, writes_scores, notices)
    _note_unread(comparison, around.data, notices)
    if comparison.is_pairwise and preference.compares_pairs:
        _check_pairs(comparison, around.data, problems)
    if preference.train_impl == "kto":
        _check_rewards(comparison, around, problems)
    if comparison.dataset_impl == "online":
        _check_servers(comparison, around, problems)
    if preference.is_on:
        _check_surroundings(preference, around, problems)


def _check_dataset(preference: PreferenceConfig, comparison: ComparisonConfig, problems: Problems) -> None:
    objective, found = preference.train_impl, comparison.dataset_impl
    wanted = _DATASET[objective]
    if found != wanted and objective == "normal":
        users = " or ".join(name for name, kind in _DATASET.items() if kind == found)
        problems.add("dataset_impl", f"{found!r} is for train_impl {users}; set train_impl, or remove dataset_impl")
    elif found != wanted:
        problems.add("train_impl", f"{objective} reads dataset_impl {wanted}, and it is {found}; set it to {wanted}")
    given = comparison.model_fields_set
    for name in sorted(given):
        if name.startswith(("pos_", "neg_")) and not comparison.is_pairwise:
            problems.add(name, f"set, and dataset_impl is {found}; set dataset_impl: pairwise, or remove it")
        if "_reward_" in name and objective != "kto":
            problems.add(name, f"set, and train_impl is {objective}; set train_impl: kto, or remove it")


def _note_unused(
    preference: PreferenceConfig, precomputed: str | None, writes_scores: bool, notices: list[str]
) -> None:
    """Keys of other objectives, and of a reference model that none here reads."""
    for objective, keys in _OF_OBJECTIVE.items():
        for key in keys:
            is_asked = getattr(preference, key) != type(preference).model_fields[key].default
            if is_asked and preference.train_impl != objective:
                notices.append(_no_effect(key, f"train_impl is {preference.train_impl}"))
    if preference.reference_load is not None and not preference.needs_reference(precomputed):
        notices.append(_no_effect("reference_load", "no reference model runs with these settings"))
    reads = preference.train_impl == "kto" or (preference.train_impl == "dpo" and not preference.dpo_reference_free)
    if precomputed is not None and not reads and not writes_scores:
        notices.append(_no_effect("precompute_model_name", "no objective here reads it"))


def _note_unread(comparison: ComparisonConfig, data: DataConfig, notices: list[str]) -> None:
    """Servers without an online dataset, and files beside one."""
    if comparison.dataset_impl == "online":
        for key in ("data_path", "train_data_paths"):
            if getattr(data, key) is not None:
                notices.append(_no_effect(key, "completions come from the servers of dataset_impl online"))
        return
    for key in ("online_dataserver_ips", "online_dataserver_ports"):
        if getattr(comparison, key) != type(comparison).model_fields[key].default:
            notices.append(_no_effect(key, f"dataset_impl is {comparison.dataset_impl}"))


def _no_effect(key: str, why: str) -> str:
    return f"{key} has no effect: {why}"


def _check_pairs(comparison: ComparisonConfig, data: DataConfig, problems: Problems) -> None:
    """Both sides, both with labels, and nothing that is read in another way."""
    for name in ("data_path", "train_data_paths", "valid_data_paths", "test_data_paths"):
        if getattr(data, name) is not None:
            problems.add(name, "not read with dataset_impl pairwise; set pos_train_data_paths and neg_train_data_paths")
    for split in SPLITS:
        names = [f"{side}_{split}_{kind}" for kind in ("data_paths", "label_data_paths") for side in ("pos", "neg")]
        lengths = {name: len(getattr(comparison, name) or ()) for name in names}
        if not any(lengths.values()) and split != "train":
            continue
        first = next((name for name in names if lengths[name]), names[0])
        for name in names:
            if not lengths[name]:
                problems.add(name, "not set, and dataset_impl pairwise reads data and labels of both sides; add it")
            elif lengths[name] != lengths[first]:
                problems.add(name, f"has {lengths[name]} entries, and {first} has {lengths[first]}; give as many")


def _check_rewards(comparison: ComparisonConfig, around: Surroundings, problems: Problems) -> None:
    data = around.data
    if data.data_path is not None:
        problems.add("data_path", "not read with train_impl kto; set train_data_paths, with labels and rewards")
    for split in SPLITS:
        documents = len(getattr(data, f"{split}_data_paths") or ())
        for section, kind in ((data, "label"), (comparison, "reward")):
            name = f"{split}_{kind}_data_paths"
            found = len(getattr(section, name) or ())
            if not found and (documents or split == "train"):
                problems.add(name, f"not set, and train_impl kto reads it beside {split}_data_paths; add it")
            elif found != documents and kind == "reward":
                problems.add(name, f"has {found} entries, and {split}_data_paths has {documents}; give as many")
    size = around.batch.train_micro_batch_size_per_gpu
    if size and size % 2:
        problems.add(
            "train_micro_batch_size_per_gpu",
            f"{size} is odd, and train_impl kto compares the halves of a micro-batch; make it even",
        )


def _check_servers(comparison: ComparisonConfig, around: Surroundings, problems: Problems) -> None:
    hosts, ports = comparison.online_dataserver_ips, comparison.online_dataserver_ports
    counts = [1 if isinstance(value, str | int) else len(value) for value in (hosts, ports)]
    if 0 in counts:
        name = "online_dataserver_ips" if counts[0] == 0 else "online_dataserver_ports"
        problems.add(name, "empty; name at least one server")
    elif 1 not in counts and counts[0] != counts[1]:
        problems.add(
            "online_dataserver_ports",
            f"has {counts[1]} entries, and online_dataserver_ips has {counts[0]}; give as many",
        )
    if any(not 0 < port < 65536 for port in ([ports] if isinstance(ports, int) else ports)):
        problems.add("online_dataserver_ports", f"expected ports from 1 to 65535, got {ports}")
    if around.training.train_epochs is not None:
        problems.add("train_epochs", "a server of completions has no end; set train_iters")


def _check_surroundings(preference: PreferenceConfig, around: Surroundings, problems: Problems) -> None:
    objective, data = preference.train_impl, around.data
    if around.parallel.pipeline_stages > 1:
        problems.add(
            "pipe_parallel_size",
            f"{around.parallel.pipeline_stages} stages cannot run train_impl {objective}; set it to 0, and "
            "model_parallel_size or zero_optimization.stage: 3 where memory is short",
        )
    if objective != "reinforce" and data.pack_impl != "unpacked":
        problems.add(
            "pack_impl",
            f"{data.pack_impl!r} lays several documents in a row, and train_impl {objective} scores one a row; "
            "set pack_impl: unpacked",
        )
    if data.document_masking:
        problems.add("document_masking", f"a row of train_impl {objective} is one document; remove it")
    if (around.training.curriculum_learning or {}).get("enabled") is True:
        problems.add("curriculum_learning", f"would cut what train_impl {objective} scores; remove it")
    if around.training.char_level_ppl:
        problems.add("char_level_ppl", f"the loss of train_impl {objective} is no perplexity; remove it")
    if objective == "rm" and around.lora.is_on:
        problems.add("lora.rank", "train_impl rm trains a new head, which lora would freeze; remove lora")
