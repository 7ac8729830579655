"""The list of datasets that a configuration names."""

import re

from config.config_samples import sample

from neox.config import config_from_dict, named_datasets, named_documents
from neox.config.schema import known_keys

LISTS = {key for key in known_keys() if re.fullmatch(r"(pos_|neg_)?(train|valid|test)(_\w+)?_data_paths", key)}
KTO = {"train_impl": "kto", "pack_impl": "unpacked", "train_micro_batch_size_per_gpu": 2}
PAIRS = {"train_impl": "dpo", "dataset_impl": "pairwise", "pack_impl": "unpacked"}


def test_every_key_is_listed() -> None:
    assert len(LISTS) == 21
    sides = ("pos_", "neg_")
    pairs = {key: [key] for key in LISTS if key.startswith(sides)}
    others = {key: [key] for key in LISTS if not key.startswith(sides)}
    found: dict[str, str] = {}
    for flat in (PAIRS | pairs, KTO | others):
        config = config_from_dict({key: value for key, value in sample().items() if key != "data_path"} | flat)
        found |= named_datasets(config)
    assert found == {f"{key}[0]": key for key in LISTS}


def test_documents_are_neither_labels_nor_rewards() -> None:
    lists = {
        f"{split}{kind}_data_paths": [f"{split}{kind}"]
        for split in ("train", "valid", "test")
        for kind in ("", "_label", "_reward")
    }
    flat = {key: value for key, value in sample().items() if key != "data_path"} | KTO | lists
    assert named_documents(config_from_dict(flat)) == ["train", "valid", "test"]


def test_one_dataset_is_listed_too() -> None:
    config = config_from_dict(sample() | {"data_path": "a"})
    assert named_datasets(config) == {"data_path": "a"}
    assert named_documents(config) == ["a"]
