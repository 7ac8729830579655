"""Are these hosts fit for a long run? Asks each of them and measures the links between them."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from neox.launch.conversation import Errand, Reply, Road, converse
from neox.launch.hostfile import Pool
from neox.launch.hosts import carried_variables
from neox.launch.node import NODE_RANK, SLOTS
from neox.launch.probe import ANSWER
from neox.launch.verdict import Row, judge, judge_links


@dataclass(frozen=True)
class Questions:
    """What to check.

    Attributes:
        pool: hosts, and the slots that a run would use.
        road: how hosts are reached.
        save: folder of the checkpoints, None if unknown.
        data: prefixes of `.bin` and `.idx`.
        checkpoint_bytes: about what one checkpoint takes; 0 if unknown.
        master_addr, master_port: where processes meet.
        write_mb: of the file that tells the speed of `save`.
        message_mb: of the messages that tell the speed of links.
        timeout: seconds for each step.
    """

    pool: Pool
    road: Road = "ssh"
    save: str | None = None
    data: Sequence[str] = ()
    checkpoint_bytes: int = 0
    master_addr: str | None = None
    master_port: int = 29500
    write_mb: int = 256
    message_mb: int = 64
    timeout: float = 120.0


def check(questions: Questions) -> list[Row]:
    """Ask and measure; return the rows of the table, worst things included.

    Links are measured only between hosts that could all be asked, and only where there is more than one process.
    """
    started = time.time()
    replies = _probe("look", questions)
    window = (started, time.time())
    answers = {host: _answer(reply) for host, reply in replies.items()}
    silent = {host: replies[host].reason for host, answer in answers.items() if answer is None}
    heard = {host: answer for host, answer in answers.items() if answer is not None}
    if questions.save is not None and heard:
        marks = _probe("look_again", questions)
        for host, answer in heard.items():
            answer["marks"] = (_answer(marks[host]) or {}).get("marks", [])
        _probe("tidy", questions)
    rows = judge(heard, silent, questions.pool, window, checkpoint_bytes=questions.checkpoint_bytes)
    if not silent:
        rows += _measure_links(questions, on_gpus=any(answer["gpus"] for answer in heard.values()))
    return rows


def _probe(step: str, questions: Questions) -> dict[str, Reply]:
    shared = {"step": step, "save": questions.save, "data": list(questions.data), "write_mb": questions.write_mb}
    errands = {
        host: Errand(["-m", "neox.launch.probe", json.dumps(shared | {"mark": host})], carried_variables(os.environ))
        for host in questions.pool
    }
    return converse(errands, road=questions.road, timeout=questions.timeout)


def _answer(reply: Reply) -> dict[str, Any] | None:
    found = [line.removeprefix(ANSWER) for line in reply.lines if line.startswith(ANSWER)]
    return json.loads(found[-1]) if found else None


def _measure_links(questions: Questions, *, on_gpus: bool) -> list[Row]:
    """Rows of the all-reduce and the links. Without GPUs one process a host is enough to load its link."""
    counts = [len(slots) if on_gpus else 1 for slots in questions.pool.values()]
    if sum(counts) == 1:
        return [Row("links", "ok", "one process: there are none")]
    shared = carried_variables(os.environ) | {
        "MASTER_ADDR": questions.master_addr or next(iter(questions.pool)),
        "MASTER_PORT": str(questions.master_port),
        SLOTS: ",".join(map(str, counts)),
    }
    argv = ["-m", "neox.launch.ranks", "neox.parallel.links", "--megabytes", str(questions.message_mb)]
    argv += ["--timeout", str(questions.timeout / 2)]
    errands = {
        host: Errand(argv, shared | {NODE_RANK: str(number), "NEOX_HOST": host} | _visible(slots, on_gpus))
        for number, (host, slots) in enumerate(questions.pool.items())
    }
    replies = converse(errands, road=questions.road, timeout=questions.timeout)
    found = next((answer for reply in replies.values() if (answer := _answer(reply)) is not None), None)
    return judge_links(found, {host: reply.reason for host, reply in replies.items() if reply.status != 0})


def _visible(slots: Sequence[int], on_gpus: bool) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slots))} if on_gpus else {}
