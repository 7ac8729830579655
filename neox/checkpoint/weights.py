"""What every source of weights offers, whatever its format on disk."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch

from neox.errors import CheckpointError


@contextmanager
def fields_of(path: Path, writer: str) -> Iterator[None]:
    """Name a file or folder where a field of it is of another kind than its writer makes.

    Raises:
        CheckpointError: it is; caused by what Python says of it.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{path}: not as {writer} writes it ({reason}); copy it again") from error


class WeightReader(Protocol):
    """Logical tensors under canonical names, `layers.<disk index>.<name>`."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        ...

    @property
    def padded_vocab_size(self) -> int:
        """Size of the softmax, V."""
        ...

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the layers."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter, without reading any."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether there is a parameter of that name."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """Read a whole parameter on the CPU, in the dtype of the file."""
        ...


def weight_source(reader: WeightReader) -> Callable[[str, torch.Size], torch.Tensor]:
    """Make the function that a model is built from: reads a parameter whose shape is the one that the model wants.

    The function raises CheckpointError before it reads, where there is no such parameter or both shapes differ.
    """
    shapes = reader.shapes()

    def read(name: str, shape: torch.Size) -> torch.Tensor:
        if name not in shapes:
            raise missing_tensor(reader.folder, name)
        check_shape(reader.folder, name, shapes[name], shape)
        return reader.tensor(name)

    return read


def check_shape(folder: Path, name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Compare the shape of a parameter with the one a model wants.

    Raises:
        CheckpointError: naming both.
    """
    if tuple(found) != tuple(wanted):
        raise CheckpointError(
            f"{folder}: {name} has shape {list(found)}, the configuration asks for {list(wanted)}; "
            "use the configuration the checkpoint was trained with"
        )


def check_vocabulary(reader: WeightReader, tokens: int) -> None:
    """See that there is a row of the embedding for each token of a tokenizer.

    Raises:
        CheckpointError: naming both numbers.
    """
    if tokens > reader.padded_vocab_size:
        raise CheckpointError(
            f"{reader.folder}: has {reader.padded_vocab_size} rows of vocabulary and the tokenizer {tokens} tokens; "
            "set vocab_file to the tokenizer of the training run"
        )


def missing_tensor(folder: Path, name: str) -> CheckpointError:
    """Return the error for a parameter that a checkpoint does not have."""
    return CheckpointError(f"{folder}: has no tensor {name}; copy the whole folder, or use its own configuration")
