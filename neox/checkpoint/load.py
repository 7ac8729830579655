"""The model of the checkpoint that `load` names, for the configuration to take its absent keys from."""

from collections.abc import Mapping
from typing import Any

from neox.config import LoadedModel


def read_loaded_model(values: Mapping[str, Any]) -> LoadedModel | None:
    """Read the model that `load` (and `iteration`) of flat keys name, without reading a tensor.

    Returns:
        None where `load` is not set, or names a folder without a checkpoint, from which a run may start afresh.

    Raises:
        CheckpointError: the checkpoint cannot be read, or holds what no model can be built from; there is none and
            the sizes of the model are not given either.
    """
    if not isinstance(values.get("load"), str):
        return None
    from neox.checkpoint.loaded_model import read_model  # torch; a mistake in a YAML file is found without

    return read_model(values)
