"""Install what the tests of this folder need, and run them; say what is left out, and why.

Network namespaces are two hosts: with sshd, pdsh, Open MPI, MPICH and Slurm from Debian's packages. Root is needed for
the namespaces and the packages. Where a part cannot be had its tests are left out, and that is no failure.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent

PARTS = {
    "two": (("ip", "nsenter", "unshare"), ("iproute2", "util-linux")),
    "ssh": (("/usr/sbin/sshd", "ssh", "ssh-keygen"), ("openssh-server", "openssh-client")),
    "pdsh": (("pdsh",), ("pdsh",)),
    "openmpi": (("mpirun.openmpi",), ("openmpi-bin",)),
    "mpich": (("mpiexec.hydra",), ("mpich",)),
    "slurm": (("slurmctld", "slurmd", "srun", "munged"), ("slurm-wlm", "munge")),
}
"""Fixtures of conftest.py: the programs that each needs, and the packages that have them."""


def lacking(part: str) -> list[str]:
    """Programs of a part that are not installed."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [program for program in PARTS[part][0] if shutil.which(program, path=path) is None]


def install(packages: list[str]) -> None:
    """Install packages as far as Debian's installer can; whether it could is seen by what is there afterwards."""
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # No daemon is to start: Debian's scripts ask this file.
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *command], env=environ, stdout=subprocess.DEVNULL, check=False)
    finally:
        if ours:
            policy.unlink()


def can_have_namespaces() -> str:
    """Why no network namespace can be made; empty if one can."""
    name = f"neox-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return made.stderr.strip()
    inside = ["nsenter", f"--net=/run/netns/{name}", "--", "unshare", "-u", "-m", "--", "true"]
    entered = subprocess.run(inside, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return entered.stderr.strip()


def main() -> int:
    """Run what can be run; the status is pytest's, or 0 where nothing can."""
    if os.geteuid() != 0:
        print("test-cluster: skipped, for network namespaces need root")
        return 0
    wanted = [package for part in PARTS if lacking(part) for package in PARTS[part][1]]
    if wanted and shutil.which("apt-get"):
        print(f"test-cluster: installing {' '.join(wanted)}", flush=True)
        install(wanted)
    missing = {part: f"{', '.join(programs)} not installed" for part in PARTS if (programs := lacking(part))}
    reason = missing.get("two") or can_have_namespaces()
    if reason:
        print(f"test-cluster: skipped, for there are no network namespaces here: {reason}")
        return 0
    for part, why in missing.items():
        print(f"test-cluster: the tests of {part} are skipped: {why}")
    environ = {**os.environ, "NEOX_CLUSTER_MISSING": ",".join(missing)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(FOLDER),
        "--durations=5",
        "--timeout=1800",
        "-o",
        "faulthandler_timeout=2400",
    ]
    return subprocess.run(command, env=environ, cwd=FOLDER.parents[1], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
