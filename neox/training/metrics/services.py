"""Metrics at services on the network: Weights & Biases and Comet.

A service that refuses what was asked of it (a wrong key, a team that is not there) is a mistake when a run starts. One
that is out of reach is not: the run trains, and its figures stay on disk.
"""

import importlib
import logging
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from neox.errors import ConfigError
from neox.secrets import masked_values

if TYPE_CHECKING:
    from neox.config import Config

log = logging.getLogger(__name__)

SECONDS_TO_ANSWER = 10.0
"""After them a service counts as out of reach, and a run at it that the configuration does not ask for is given up."""

_COMET = "https://www.comet.com/clientlib/"


def wandb_sinks(config: "Config", *, rank: int, environ: Mapping[str, str]) -> "list[WandbSink]":
    """The run at Weights & Biases, if there is to be one.

    Raises:
        ConfigError: `use_wandb` asks for it, and the server refuses it.
    """
    settings = config.logging
    if not wants_wandb(settings.use_wandb, host=settings.wandb_host, environ=environ):
        return []
    try:
        return [WandbSink(config, rank=rank)]
    except ConfigError as error:
        if settings.use_wandb:
            raise
        log.warning("%s; training continues without it, as use_wandb is not set", error)
        return []


class WandbSink:
    """A run at Weights & Biases, or on disk alone with WANDB_MODE=offline, or where the server is out of reach.

    With `wandb_init_all_ranks` each process has one, named after its rank.
    """

    refusals: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, config: "Config", *, rank: int = 0) -> None:
        wandb = optional_import("wandb", key="use_wandb", install="pip install wandb")
        settings = config.logging
        name = settings.wandb_run_name
        if settings.wandb_init_all_ranks:
            name = f"{name}-rank{rank}" if name else f"rank{rank}"
        asked: dict[str, Any] = {
            "project": settings.wandb_project,
            "entity": settings.wandb_team,
            "group": settings.wandb_group,
            "name": name,
            "config": masked_values(config.to_flat()),
        }
        limits = {} if settings.use_wandb else {"init_timeout": SECONDS_TO_ANSWER}
        try:
            self.run = wandb.init(**asked, settings=wandb.Settings(base_url=settings.wandb_host, **limits))
        except Exception as error:  # of its own, of pydantic and of the disk
            reason = _first_line(error)
            lies_in_key = isinstance(error, wandb.errors.AuthenticationError)
            may_be_outage = isinstance(error, wandb.errors.CommError) and not lies_in_key
            if not settings.use_wandb or not may_be_outage or _answers(settings.wandb_host):
                mend = "run `wandb login`, set WANDB_MODE=offline or use_wandb: false"
                raise ConfigError(f"Weights & Biases: {reason}: {mend}") from error
            self.run = wandb.init(**asked, mode="offline")
            log.warning(
                "Weights & Biases is out of reach (%s); the run is kept in %s, for `wandb sync`", reason, self.run.dir
            )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self.run.log(dict(metrics), step=step)

    def progress(self, step: int) -> None:
        """Nothing to record."""

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


class CometSink:
    """An experiment at Comet; on disk with COMET_START_ONLINE=false, or where the server is out of reach."""

    refusals: ClassVar[tuple[type[Exception], ...]] = (Exception,)

    def __init__(self, config: "Config") -> None:
        comet = optional_import("comet_ml", key="use_comet", install="pip install comet_ml")
        settings = config.logging
        place = {"workspace": settings.comet_workspace, "project": settings.comet_project}
        try:
            self.experiment = comet.start(**place)
        except Exception as error:  # Comet has no class that all its errors share
            reason = _first_line(error)
            if _answers(os.environ.get("COMET_URL_OVERRIDE", _COMET)):
                mend = "set COMET_API_KEY, COMET_START_ONLINE=false or use_comet: false"
                raise ConfigError(f"Comet: {reason}: {mend}") from error
            self.experiment = comet.start(**place, online=False)
            log.warning("Comet is out of reach (%s); the experiment is kept on disk, for `comet upload`", reason)
        if settings.comet_experiment_name:
            self.experiment.set_name(settings.comet_experiment_name)
        self.experiment.add_tags(list(settings.comet_tags or ()))
        self.experiment.log_others(settings.comet_others or {})
        self.experiment.log_parameters(masked_values(config.to_flat()))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics of a step."""
        self.experiment.log_metrics(dict(metrics), step=step)

    def progress(self, step: int) -> None:
        """Nothing to record."""

    def close(self) -> None:
        """Send what is left and finish the experiment."""
        self.experiment.end()


def wants_wandb(use_wandb: bool | None, *, host: str, environ: Mapping[str, str]) -> bool:
    """Whether to report to Weights & Biases; with `use_wandb` absent, as upstream, if an API key is found."""
    if use_wandb is not None:
        return use_wandb
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_LOCAL"):
        return True
    try:
        return netrc.netrc(environ.get("NETRC")).authenticators(urlsplit(host).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def optional_import(name: str, *, key: str, install: str) -> ModuleType:
    """Import what a key asks for.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = error.name or name
        raise ConfigError(f"{key} is set but {missing} is not installed: {install}, or unset {key}") from error


def _answers(address: str) -> bool:
    """Whether a server answers at all, whatever it says; one that is out of order does not.

    Its answer tells a refusal from an outage, which the errors of the clients do not.
    """
    try:
        with urllib.request.urlopen(address, timeout=SECONDS_TO_ANSWER):
            return True
    except urllib.error.HTTPError as error:
        with error:
            return error.code < 500
    except OSError:
        return False
    except ValueError:  # what is no address is a mistake
        return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
