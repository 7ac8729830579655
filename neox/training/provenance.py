"""What a run is made of beside its configuration: the code, the packages, and the data files."""

from functools import cache
from typing import Any

import xxhash

from neox.config import Config, named_datasets
from neox.data.indexed import data_file, index_file
from neox.versions import commit, package_version

PACKAGES = ("neox", "torch", "deepspeed", "megatron-core")
SAMPLED_BYTES = 2**20
"""Read at the beginning, in the middle and at the end of an index file."""


def provenance(config: Config) -> dict[str, Any]:
    """Collect what a checkpoint records of a run: `commit`, `packages`, and `data` by key and place in its list."""
    data = {place: _fingerprint(prefix) for place, prefix in named_datasets(config).items()}
    return {"commit": commit(), "packages": {name: package_version(name) for name in PACKAGES}, "data": data}


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
