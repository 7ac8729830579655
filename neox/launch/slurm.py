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
from neox.launch.clock import STARTED
from neox.launch.reporting import ERROR_LOCK
from neox.launch.restarts import REQUEUE_STATUS
from neox.launch.variables import RESTARTS


@dataclass(frozen=True)
class Job:
    """What a batch file asks of Slurm.

    Attributes:
        name: of the job; its log is NAME-NUMBER.out.
        nodes: numbers of hosts that the run can use, in order; several only if it is elastic.
        tasks_per_node, gpus_per_node: processes of each host, GPUs of each.
        command: script and arguments that every process runs after `python -u`.
        check: configuration arguments of a check of all hosts before the run, None for no check.
        time, partition, account, comment: sbatch's own; None leaves them to the cluster.
        cpus_per_task: cores of a process; None leaves it to the cluster.
        logs: folder of the log.
        warning: seconds before the time limit at which the run is asked to save and stop.
        requeue: whether a run that was to end early goes back into the queue.
        requeue_status: exit status of such a run.
        save: folder of its checkpoints, in which progress is seen; None if there is none.
        max_restarts: how often in a row, without a new checkpoint, a run that failed is started again inside the
            allocation, and how often it is requeued.
        sbatch, srun: further options, each a word such as `--qos=high`.
    """

    name: str
    nodes: Sequence[int]
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
    requeue_status: int = REQUEUE_STATUS
    save: Path | None = None
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
    where = "" if len(job.nodes) == 1 else f' --nodes="$nodes" --ntasks=$((nodes * {job.tasks_per_node}))'
    return _SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in _options(job, folder)),
        folder=shlex.quote(str(folder)),
        logs=shlex.quote(str(folder / job.logs)),
        latest=shlex.quote(str(folder / job.save / "latest")) if job.save is not None else "''",
        check=f"{shlex.join(check)} || exit 1\n\n" if job.check is not None else "",
        nodes=_CHOICE.format(nodes=" ".join(map(str, job.nodes))) if where else "",
        requeue=_REQUEUE.format(limit=job.max_restarts) if job.requeue else '    exit "$status"',
        requeue_status=job.requeue_status,
        limit=job.max_restarts,
        lock=ERROR_LOCK,
        started=STARTED,
        restarts=RESTARTS,
        step=f"srun --kill-on-bad-exit=1 $cores{where} {shlex.join([*job.srun, python, '-u', *job.command])}",
    )


def _options(job: Job, folder: Path) -> list[str]:
    given = {
        "job-name": job.name,
        "nodes": "-".join(map(str, sorted({min(job.nodes), max(job.nodes)}))),
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


_CHOICE = """\
# Slurm may have given any number of hosts in between.
for choice in {nodes}; do
    [ "$choice" -gt "$SLURM_JOB_NUM_NODES" ] || nodes=$choice
done

"""

_REQUEUE = """\
    # Turns that end without a new checkpoint are counted, lest a run that cannot get on is queued for ever.
    turns=$(($(cat "$idle" 2>/dev/null || echo 0) + 1))
    [ "$(newest)" = "$first" ] || turns=0
    if [ "$turns" -gt {limit} ]; then
        echo "$turns turns without a new checkpoint; not requeued" >&2
        rm -f "$idle"
        exit "$status"
    fi
    echo "$turns" >"$idle"
    exec scontrol requeue "$SLURM_JOB_ID\""""

_SCRIPT = """\
#!/bin/bash
{options}

# Slurm warns this script before the time limit (--signal=B:USR1@...). It passes the warning to every process, which
# saves and ends with status {requeue_status}. Then the job goes back into the queue, if it may, and starts again from
# the newest checkpoint. Status 0 is a run that is done, or that was asked to end; 2 is a mistake, which trying again
# does not mend; after any other the run is started again here. Slurm itself requeues a job that loses a host.

cd {folder} || exit 1
logs={logs}
idle=$logs/.idle-$SLURM_JOB_ID

newest() {{
    stat -c %y {latest} 2>/dev/null
    cat {latest} 2>/dev/null
}}
first=$(newest)

warned=
step=
warn() {{
    warned=1
    [ -z "$step" ] || kill -USR1 "$step"
}}
trap warn USR1

again() {{
{requeue}
}}

{check}{nodes}# The first process that meets a user's mistake writes 2; srun's own status is that of those it then ends.
export {lock}=$logs/.mistake-$SLURM_JOB_ID
# time_limit counts from here, whatever is started again.
export {started}=$(date +%s)
# srun does not take this over from the job since Slurm 22.05, and would give every process one core.
cores=${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}}

status={requeue_status}
restarts=0
while [ -z "$warned" ]; do
    rm -f "${lock}"
    before=$(newest)
    {step} </dev/null &
    step=$!
    wait "$step"
    status=$?
    # A trapped signal ends `wait`, and not the step.
    while kill -0 "$step" 2>/dev/null; do
        wait "$step"
        status=$?
    done
    mistake=$(cat "${lock}" 2>/dev/null)
    rm -f "${lock}"
    [ "$mistake" != 2 ] || exit 2
    [ "$status" -ne 0 ] || {{ rm -f "$idle"; exit 0; }}
    [ "$status" -ne {requeue_status} ] || break
    [ -z "$warned" ] || break
    export {restarts}=$((${restarts} + 1))
    [ "$(newest)" = "$before" ] || restarts=0
    restarts=$((restarts + 1))
    [ "$restarts" -le {limit} ] || exit "$status"
    echo "status $status; restart $restarts of {limit}" >&2
    sleep $((restarts < 6 ? 2 ** (restarts - 1) : 60))
done
again
"""


def write_batch_file(job: Job, path: Path, *, folder: Path) -> None:
    """Write the batch file, and make the folder of its log, which Slurm does not.

    Raises:
        UserError: either cannot be written.
    """
    try:
        (folder / job.logs).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"--logs {job.logs}: cannot be made ({error.strerror}); choose another folder") from None
    write_whole(path, batch_file(job, folder=folder))
    path.chmod(0o755)


def submit(path: Path) -> str:
    """Give a batch file to Slurm; return the job's number.

    Raises:
        LaunchError: there is no Slurm here, or it refuses the job.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)], capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        raise LaunchError(f"sbatch is not installed here: submit {path} where it is") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise LaunchError(f"{path}: sbatch refused it: {reason}")
    return re.split(r"[;\s]", done.stdout.strip())[0]
