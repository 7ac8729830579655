"""Errors that a user can mend. Their text is one line: what is wrong, where, and how to mend it."""


class UserError(Exception):
    """A mistake in what the user asked for; `str(error)` is the line shown to them."""


class ConfigError(UserError):
    """A configuration that cannot be run. Several mistakes give one line each."""


class DataError(UserError):
    """A data file or tokenizer that is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or does not fit the configuration."""


class LaunchError(UserError):
    """Processes that cannot be started or cannot find each other."""
