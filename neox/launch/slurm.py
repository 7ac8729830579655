"""Slurm batch files that take themselves up again: warned before the time limit, requeued, resumed."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neox.errors import LaunchError
from neox.files import write_whole
from neox.launch.reporting import ERROR_LOCK


@dataclass(frozen=True)
class Job:
    """What a batch file asks of Slurm.

    Attributes:
        name: of the job; its log is NAME-NUMBER.out.
        nodes, tasks_per_node, gpus_per_node: hosts, processes of each, GPUs of each.
        command: script and arguments that every process runs after `python -u`.
        check: configuration arguments of a check of all hosts before the run, None for no check.
        time, partition, account, comment: sbatch's own; None leaves them to the cluster.
        cpus_per_task: cores of a process; None leaves it to the cluster.
        logs: folder of the log.
        warning: seconds before the time limit at which the run is asked to save and stop.
        requeue: whether a job that was warned goes back into the queue.
        max_restarts: how often a run that failed is started again inside the allocation.
        sbatch, srun: further options, each a word such as `--qos=high`.
    """

    name: str
    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    command: Sequence[str]
    check: Sequence[str] | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    comment: str | None = None
    cpus_per_task: int | None = None
    logs: str = "logs"
    warning: int = 300
    requeue: bool = True
    max_restarts: int = 3
    sbatch: Sequence[str] = ()
    srun: Sequence[str] = ()


def batch_file(job: Job, *, folder: Path, python: str = sys.executable) -> str:
    """The text of the batch file.

    Args:
        job: what to run, and where.
        folder: working folder, which all hosts see under this path.
        python: the interpreter on the hosts.
    """
    check = [python, "-m", "neox.launch", "check", "--slurm", *(job.check or ())]
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(job, folder)),
        folder=shlex.quote(str(folder)),
        logs=shlex.quote(str(folder / job.logs)),
        check=f"{shlex.join(check)} || exit 1\n\n" if job.check is not None else "",
        again='exec scontrol requeue "$SLURM_JOB_ID"' if job.requeue else "exit 0",
        restarts=job.max_restarts,
        lock=ERROR_LOCK,
        step=shlex.join(["srun", "--kill-on-bad-exit=1", *job.srun, python, "-u", *job.command]),
    )


def _options(job: Job, folder: Path) -> list[str]:
    given = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": job.tasks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus_per_task,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "comment": job.comment,
        "output": folder / job.logs / "%x-%j.out",
        "open-mode": "append",
        "signal": f"B:USR1@{job.warning}",
    }
    words = [f"--{name}={shlex.quote(str(value))}" for name, value in given.items() if value is not None]
    return [*words, "--requeue" if job.requeue else "--no-requeue", *job.sbatch]


_SCRIPT = """\
#!/bin/bash
{options}

# Slurm warns this script before the time limit (--signal=B:USR1@...). It passes the warning to every process, which
# saves and stops. Then the job goes back into the queue, if it may, and starts again from the newest checkpoint.
# Slurm itself requeues a job that loses a host.

cd {folder} || exit 1

warned=
step=
warn() {{
    warned=1
    [ -z "$step" ] || kill -USR1 "$step"
}}
trap warn USR1

{check}# The first process that meets a user's mistake writes to it; srun's own status is that of those it then ends.
export {lock}={logs}/.mistake-$SLURM_JOB_ID

restarts=0
while [ -z "$warned" ]; do
    rm -f "${lock}"
    {step} </dev/null &
    step=$!
    wait "$step"
    status=$?
    # A trapped signal ends `wait`, and not the step.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        status=$?
    done
    # Trying again mends no mistake.
    [ ! -s "${lock}" ] || {{ rm -f "${lock}"; exit 2; }}
    [ -z "$warned" ] || break
    [ "$status" -ne 0 ] || exit 0
    restarts=$((restarts + 1))
    [ "$restarts" -le {restarts} ] || exit "$status"
    echo "status $status; restart $restarts of {restarts}" >&2
done
{again}
"""


def write_batch_file(job: Job, path: Path, *, folder: Path) -> None:
    """Write the batch file, and make the folder of its log, which Slurm does not."""
    (folder / job.logs).mkdir(parents=True, exist_ok=True)
    write_whole(path, batch_file(job, folder=folder))
    path.chmod(0o755)


def submit(path: Path) -> str:
    """Give a batch file to Slurm; return the job's number.

    Raises:
        LaunchError: there is no Slurm here, or it refuses the job.
    """
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(f"sbatch is not installed here: submit {path} where it is") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LaunchError(f"{path}: sbatch refused it: {reason}")
    return re.split(r"[;\s]", done.stdout.strip())[0]
