"""Which datasets a configuration names, under every key that names some."""

from collections.abc import Iterator

from neox.config.config import Config
from neox.config.data import SPLITS

_SIDES = ("", "pos_", "neg_")
_KINDS = ("", "_label", "_reward")


def named_datasets(config: Config) -> dict[str, str]:
    """Prefix of `.bin` and `.idx` of every dataset, by key and place in the key's list: `train_data_paths[0]`."""
    found = {"data_path": config.data.data_path} if config.data.data_path else {}
    for key, prefixes in _lists(config):
        found |= {f"{key}[{place}]": prefix for place, prefix in enumerate(prefixes)}
    return found


def named_documents(config: Config) -> list[str]:
    """Prefixes of those that hold documents, neither labels nor rewards, each once."""
    found = {key: prefix for key, prefix in named_datasets(config).items() if "_label_" not in key}
    return list(dict.fromkeys(prefix for key, prefix in found.items() if "_reward_" not in key))


def _lists(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    for split in SPLITS:
        for side in _SIDES:
            for kind in _KINDS:
                key = f"{side}{split}{kind}_data_paths"
                sections = (config.data, config.comparison)
                yield key, next((value for section in sections if (value := getattr(section, key, None))), ())
