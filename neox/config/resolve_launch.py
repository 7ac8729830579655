"""Rules of hosts and launchers."""

from neox.config.launch import LaunchConfig
from neox.config.problems import Problems


def check_launch(launch: LaunchConfig, problems: Problems) -> None:
    """Check that what chooses among hosts has hosts to choose from."""
    if launch.include and launch.exclude:
        problems.add("exclude", f"{launch.exclude!r} is set together with include {launch.include!r}; keep one of them")
        return
    key = "include" if launch.include else "exclude"
    if getattr(launch, key) and launch.hostfile is None and not launch.deepspeed_slurm:
        problems.add(key, "chooses among the hosts of a hostfile, and there is none; set hostfile, or remove it")
