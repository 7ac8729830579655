"""What a run is made of beside its configuration: the code, the packages, and the data files."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

import neox
from neox.config import Config
from neox.data.build import SPLITS
from neox.data.indexed import data_file, index_file

PACKAGES = ("neox", "torch", "deepspeed", "megatron-core")
SAMPLED_BYTES = 2**20
"""Read at the beginning, in the middle and at the end of an index file."""


def provenance(config: Config) -> dict[str, Any]:
    """Collect what a checkpoint records of a run: `commit`, `packages`, and `data` by key and place in its list."""
    data = {place: _fingerprint(prefix) for place, prefix in data_prefixes(config).items()}
    return {"commit": _commit(), "packages": {name: _version(name) for name in PACKAGES}, "data": data}


def data_prefixes(config: Config) -> dict[str, str]:
    """Every dataset that the configuration names, by key, with its place in the list: `train_data_paths[0]`."""
    found = {"data_path": config.data.data_path} if config.data.data_path else {}
    for key, prefixes in _lists(config):
        found |= {f"{key}[{place}]": prefix for place, prefix in enumerate(prefixes)}
    return found


def _lists(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    for split in SPLITS:
        for kind in ("", "_label"):
            key = f"{split}{kind}_data_paths"
            yield key, getattr(config.data, key) or ()


@cache
def _fingerprint(prefix: str) -> dict[str, Any] | None:
    """Sizes of the two files, and a hash of parts of the index, which holds the length of every document."""
    tokens, index = data_file(prefix), index_file(prefix)
    try:
        size = index.stat().st_size
        digest = xxhash.xxh3_128()
        with index.open("rb") as file:
            for start in sorted({0, max(0, (size - SAMPLED_BYTES) // 2), max(0, size - SAMPLED_BYTES)}):
                file.seek(start)
                digest.update(file.read(SAMPLED_BYTES))
        return {"tokens_bytes": tokens.stat().st_size, "index_bytes": size, "index_hash": digest.hexdigest()}
    except OSError:
        return None


@cache
def _commit() -> str | None:
    """Commit of the code, with `+` where files that git knows were changed; None outside a repository."""
    root = Path(neox.__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
