"""Rules of what is measured."""

from neox.config.logging import LoggingConfig
from neox.config.problems import Problems


def check_logging(logging: LoggingConfig, problems: Problems) -> None:
    """Check that the profiled stretch is one."""
    if logging.profile and logging.profile_step_stop <= logging.profile_step_start:
        problems.add(
            "profile_step_stop",
            f"{logging.profile_step_stop} is not after profile_step_start {logging.profile_step_start}; raise it",
        )
