"""Sample orders kept on disk beside the corpus, and who computes them when many processes start together.

The three arrays go under upstream's names. A small JSON file beside them says what they were computed from;
where it does not match the corpus of today (or is absent), the arrays are computed again and never used as
they are. Those of another corpus, split or labels stay: a run may be reading them.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neox.data.packing import IndexMaps
from neox.data.stored import stored_npy
from neox.files import whole_file
from neox.patience import IMPATIENT, Patience

log = logging.getLogger(__name__)

ALGORITHM = 1  # raise it when the same inputs come to give other arrays


def no_barrier() -> None:
    """Wait for nobody: the barrier of a single process."""


@dataclass(frozen=True)
class Coordinator:
    """Where this process stands among those that start together.

    Attributes:
        global_rank: rank among all processes.
        local_rank: rank among the processes of this machine.
        barrier: returns when every process has called it.
    """

    global_rank: int = 0
    local_rank: int = 0
    barrier: Callable[[], None] = no_barrier

    def is_builder(self, *, use_shared_fs: bool) -> bool:
        """Tell whether this process writes the files: one in all, or without a shared disk one a machine."""
        return (self.global_rank if use_shared_fs else self.local_rank) == 0


SINGLE_PROCESS = Coordinator()


def map_stem(
    prefix: str | Path,
    *,
    name: str,
    num_samples: int | None,
    seq_length: int,
    seed: int,
    pack_impl: str,
    chopped: bool,
) -> str:
    """Return the path, without `_doc_idx.npy` and the like, under which upstream keeps these maps."""
    ending = "_ac" if chopped else ""
    return f"{prefix}_{name}_indexmap_{num_samples}ns_{seq_length}sl_{seed}s_{pack_impl}pi{ending}"


def cached_maps(
    stem: str,
    fingerprint: Mapping[str, Any],
    build: Callable[[], IndexMaps],
    *,
    coordinator: Coordinator = SINGLE_PROCESS,
    use_shared_fs: bool = True,
    patience: Patience = IMPATIENT,
) -> IndexMaps:
    """Return the maps kept under `stem`, computing them first if what is there has another fingerprint.

    One process computes and writes while the others wait. Where `stem` is taken by maps with another fingerprint, these
    go under a name with a hash of their own, so that no two runs replace each other's order. Where the folder cannot be
    written, each process computes its own in memory and says so. Every process must make this call.

    Args:
        stem: path without `_doc_idx.npy` and the like, see `map_stem`.
        fingerprint: all that the maps depend on; must survive JSON.
        build: computes the maps; pure.
        coordinator: who else is there.
        use_shared_fs: whether one machine's file is seen by all.
        patience: how long a read that fails is tried again.
    """
    wanted = json.loads(json.dumps({"algorithm": ALGORITHM, **fingerprint}))
    built = None
    try:
        if coordinator.is_builder(use_shared_fs=use_shared_fs) and _load(stem, wanted, patience) is None:
            built = build()
            _store(_free_stem(stem, wanted), wanted, built)
    except OSError as error:
        log.warning("%s: cannot keep the sample order here (%s); it stays in memory", stem, error)
    finally:
        coordinator.barrier()  # even on an error, or the others would wait for ever
    return _load(stem, wanted, patience) or built or build()


def _paths(stem: str) -> dict[str, Path]:
    return {field: Path(f"{stem}_{field}.npy") for field in IndexMaps._fields}


def _fingerprint_path(stem: str) -> Path:
    return Path(f"{stem}_fingerprint.json")


def _load(stem: str, wanted: Mapping[str, Any], patience: Patience) -> IndexMaps | None:
    """Return the maps on disk, or None if they are absent, damaged or of another corpus."""
    for place in (stem, _own_stem(stem, wanted)):
        if _fingerprint(place) != wanted:
            continue
        try:
            return IndexMaps(**{field: stored_npy(path, patience) for field, path in _paths(place).items()})
        except (OSError, ValueError):
            continue
    return None


def _fingerprint(stem: str) -> Any:
    """What the maps under a stem say they were computed from; None where that is absent or damaged."""
    try:
        return json.loads(_fingerprint_path(stem).read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _own_stem(stem: str, wanted: Mapping[str, Any]) -> str:
    return f"{stem}_{hashlib.blake2b(json.dumps(wanted, sort_keys=True).encode(), digest_size=8).hexdigest()}"


def _free_stem(stem: str, wanted: Mapping[str, Any]) -> str:
    return stem if _fingerprint(stem) in (None, wanted) else _own_stem(stem, wanted)


def _store(stem: str, fingerprint: Mapping[str, Any], maps: IndexMaps) -> None:
    """Write the arrays, then the fingerprint that makes them valid; each appears whole or not at all."""
    _fingerprint_path(stem).unlink(missing_ok=True)
    for field, path in _paths(stem).items():
        with whole_file(path) as part, part.open("wb") as file:
            np.save(file, getattr(maps, field))
    with whole_file(_fingerprint_path(stem)) as part:
        part.write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
