"""Numbers read from environment variables."""

import re
from collections.abc import Mapping

from neox.errors import LaunchError

DEFAULT_MASTER_PORT = 29500

RESTARTS = "NEOX_RESTARTS"
"""How often a run was started again before; set for its ranks by what does so: train.py, or a batch file."""


def integer(environ: Mapping[str, str], name: str) -> int:
    """The value of a variable as a whole number.

    Raises:
        LaunchError: it is missing, or no number.
    """
    text = environ.get(name)
    if text is None:
        raise LaunchError(
            f"{name} is not set, though the launcher's other variables are: use one launcher for all ranks"
        )
    if not re.fullmatch(r"\d{1,18}", text):
        raise LaunchError(f"{name}={text!r} is not a whole number: correct it, or unset it to run without a launcher")
    return int(text)


def port(environ: Mapping[str, str], name: str, default: int) -> int:
    """The port that a variable names, or the default where it is unset or empty.

    Raises:
        LaunchError: no port has that number.
    """
    found = integer(environ, name) if environ.get(name) else default
    if not 0 < found < 65536:
        raise LaunchError(f"{name}={found} is no port: set it to a number from 1 to 65535")
    return found
