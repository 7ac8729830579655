"""Errors that a user can mend. Their text is one line: what is wrong, where, and how to mend it."""

from typing import ClassVar


class UserError(Exception):
    """A mistake in what the user asked for; `str(error)` is the line shown to them.

    Attributes:
        exit_status: of the script that it ends.
    """

    exit_status: ClassVar[int] = 2


class ConfigError(UserError):
    """A configuration that cannot be run. Several mistakes give one line each."""


class DataError(UserError):
    """A data file or tokenizer that is missing, damaged or does not fit."""


class LostDataError(DataError):
    """A data file that could be read and then could not. Nobody's mistake: starting again may help, and is worth it."""

    exit_status = 1


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the configuration."""


class UnreadError(CheckpointError):
    """A checkpoint that is there and that storage does not give. Nobody's mistake, nor damage: later it may be read."""

    exit_status = 1


class UnsavedError(CheckpointError):
    """A checkpoint that storage refused. Nobody's mistake: trying again, and later starting again, may help.

    Attributes:
        is_full: there was no space.
    """

    exit_status = 1

    def __init__(self, text: str, *, is_full: bool = False) -> None:
        super().__init__(text)
        self.is_full = is_full


class CorruptionError(UserError):
    """Numbers that changed by themselves. Nobody's mistake: start again from before, without the machine named."""

    exit_status = 1


class LaunchError(UserError):
    """Processes that cannot be started or cannot find each other."""


class OutputError(UserError):
    """Standard output that takes no more: a full disk behind it, say. Nobody's mistake."""

    exit_status = 1


class AbsentError(LaunchError):
    """Processes that did not come where all were to meet. One may be lost, which is no mistake: start again."""

    exit_status = 3
