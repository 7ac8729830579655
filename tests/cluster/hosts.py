"""Two hosts on one machine: network namespaces with names, addresses and a wire between them.

Needs root and iproute2. Everything lies in namespaces of this process's own and in one temporary folder, so that
nothing of the machine changes and two such pairs do not meet.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("n1", "n2")
ADDRESSES = {"n1": "10.77.0.1", "n2": "10.77.0.2"}


@dataclass
class Cluster:
    """Hosts `n1` and `n2`, and the folder of everything that belongs to them.

    Attributes:
        folder: temporary; both hosts see it, as they see the whole file system.
        variables: environment of every command.
    """

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def small_disk(self) -> Path:
        """A disk of 24 MiB, which both hosts see."""
        return self.folder / "small-disk"

    @property
    def switch(self) -> str:
        """Namespace that holds the bridge."""
        return f"{self.folder.name}-switch"

    def namespace(self, host: str) -> str:
        """Namespace of a host."""
        return f"{self.folder.name}-{host}"

    def command(self, host: str, words: Sequence[str]) -> list[str]:
        """A command that runs `words` on a host, with that host's name and its own /etc/hosts.

        Not `ip netns exec`, which mounts another /sys, without the control groups that slurmd looks for.
        """
        enter = ["nsenter", f"--net=/run/netns/{self.namespace(host)}", "--", "unshare", "-u", "-m", "--", "sh", "-c"]
        script = f'hostname {host}; mount --bind {self.folder}/etc-hosts /etc/hosts; exec "$@"'
        return [*enter, script, host, *words]

    def start(self, host: str, *words: str | Path, **variables: str) -> "subprocess.Popen[str]":
        """Start a command on a host."""
        return subprocess.Popen(
            self.command(host, [str(word) for word in words]),
            env={**os.environ, **self.variables, **variables},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, host: str, *words: str | Path, timeout: float = 600, **variables: str) -> tuple[int, str]:
        """Run a command on a host; return its status and what it printed."""
        process = self.start(host, *words, **variables)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            raise AssertionError(f"{words[:4]} did not end in {timeout} s:\n{out[-3000:]}") from None
        return process.returncode, out

    def name_hosts(self, addresses: dict[str, str]) -> None:
        """Write the /etc/hosts that commands started from now on see."""
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "etc-hosts").write_text("\n".join(lines) + "\n")

    def set_link(self, host: str, state: str) -> None:
        """Cut (`down`) or mend (`up`) the wire of a host."""
        root("ip", "-n", self.switch, "link", "set", host, state)


def root(*words: str | Path) -> None:
    """Run a command that must succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stdout}{done.stderr}"


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Two hosts for the length of a `with`; whatever still runs on them at its end is killed."""
    made = Cluster(folder, {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    made.name_hosts(ADDRESSES)
    made.small_disk.mkdir()
    root("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", made.small_disk)
    try:
        _wire(made)
        yield made
    finally:
        _remove(made)


def _wire(made: Cluster) -> None:
    root("ip", "netns", "add", made.switch)
    root("ip", "-n", made.switch, "link", "add", "bridge", "type", "bridge")
    root("ip", "-n", made.switch, "link", "set", "bridge", "up")
    for host in NAMES:
        space = made.namespace(host)
        root("ip", "netns", "add", space)
        root("ip", "-n", made.switch, "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", space)
        root("ip", "-n", made.switch, "link", "set", host, "master", "bridge", "up")
        root("ip", "-n", space, "addr", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            root("ip", "-n", space, "link", "set", device, "up")


def _remove(made: Cluster) -> None:
    for space in (*map(made.namespace, NAMES), made.switch):
        inside = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
        for pid in inside.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
    subprocess.run(["umount", "--lazy", str(made.small_disk)], capture_output=True, check=False)


def wait_until(happened: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Wait for something, and fail if it does not come."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen in {seconds} s"
        time.sleep(0.1)


def rank_process(save: Path, rank: int) -> int:
    """The process of a rank of the run that saves to a folder, on whichever host; hosts share the process numbers.

    Raises:
        ProcessLookupError: there is none.
    """
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
            is_rank = f"RANK={rank}".encode() in variables or f"SLURM_PROCID={rank}".encode() in variables
            if is_rank and f"save={save}".encode() in words and words[0].endswith(b"python"):
                return int(process.name)
    raise ProcessLookupError(f"no rank {rank} of {save}")


def start_ssh(made: Cluster) -> None:
    """An sshd on each host, and a client in front of PATH that has the key; nothing is written to ~/.ssh."""
    folder = made.folder / "ssh"
    (folder / "bin").mkdir(parents=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    for key in ("identity", "host"):
        root("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key)
    shutil.copy(folder / "identity.pub", folder / "authorized")
    server = {
        "Port": 22,
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "authorized",
        "StrictModes": "no",
        "UsePAM": "no",
        "PasswordAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "PidFile": "none",
        # Every host of a large run is asked at the same moment.
        "MaxStartups": "100",
    }
    (folder / "sshd.conf").write_text("".join(f"{name} {value}\n" for name, value in server.items()))
    client = {
        "IdentityFile": folder / "identity",
        "IdentitiesOnly": "yes",
        "UserKnownHostsFile": folder / "known",
        "StrictHostKeyChecking": "accept-new",
        "LogLevel": "ERROR",
    }
    (folder / "config").write_text("Host *\n" + "".join(f"  {name} {value}\n" for name, value in client.items()))
    program = folder / "bin" / "ssh"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    program.chmod(0o755)
    made.variables["PATH"] = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    for host in NAMES:
        status, out = made.run(host, "/usr/sbin/sshd", "-f", folder / "sshd.conf", "-E", folder / f"{host}.log")
        assert status == 0, out


def slurm_settings(folder: Path) -> str:
    """Content of slurm.conf: n1 leads, both hosts work, everything that is written goes to `folder`."""
    nodes = "".join(
        f"NodeName={n} NodeAddr={a} NodeHostname={n} CPUs=4 RealMemory=4000 State=UNKNOWN\n"
        for n, a in ADDRESSES.items()
    )
    settings = {
        "ClusterName": "two",
        "SlurmctldHost": f"n1({ADDRESSES['n1']})",
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        # A requeued job waits until credentials of its first start have expired, by default two minutes.
        "AuthInfo": f"socket={folder / 'munge.sock'},cred_expire=5",
        "CredType": "cred/munge",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "%n",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.%n.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.%n.log",
        # No control groups: a container may not have them to give.
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SwitchType": "switch/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_CPU",
        "SlurmdParameters": "config_overrides",
        "ReturnToService": 2,
        "SlurmdTimeout": 30,
        "KillWait": 5,
        "MinJobAge": 600,
        "SchedulerParameters": "sched_interval=2,bf_interval=2,batch_sched_delay=0",
    }
    text = "".join(f"{name}={value}\n" for name, value in settings.items())
    partition = "PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP\n"
    return text + nodes + partition


def start_slurm(made: Cluster) -> None:
    """munged, slurmctld on n1 and a slurmd on each host, with everything they write in the temporary folder."""
    folder = made.folder / "slurm"
    for name in ("state", *NAMES):
        (folder / name).mkdir(parents=True)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    places = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "seed-file": "munge.seed"}
    flags = [f"--{flag}={folder / name}" for flag, name in places.items()]
    # --force: a key and a socket in a temporary folder are what munged warns of.
    root("munged", "--force", *flags, f"--log-file={folder / 'munge.log'}", "--num-threads=2")
    (folder / "slurm.conf").write_text(slurm_settings(folder))
    made.variables["SLURM_CONF"] = str(folder / "slurm.conf")
    for host, words in (("n1", ["slurmctld"]), *((name, ["slurmd", "-N", name]) for name in NAMES)):
        status, out = made.run(host, *words, "-c", "-f", folder / "slurm.conf")
        assert status == 0, out

    def idle() -> bool:
        return made.run("n1", "sinfo", "-h", "-o", "%D %t")[1].strip() == "2 idle"

    wait_until(idle, "two idle Slurm hosts")


def stop_slurm(made: Cluster) -> None:
    """End munged, which lives outside of the namespaces; the rest ends with them."""
    pid = made.folder / "slurm" / "munge.pid"
    if pid.is_file():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid.read_text()), signal.SIGTERM)
