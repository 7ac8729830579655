"""What the answers of the hosts mean: rows of one table, and go or no go."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from neox.launch.hostfile import Pool
from neox.versions import differences

State = Literal["ok", "warn", "fail"]
Answers = Mapping[str, Mapping[str, Any]]

MOST_CLOCK_SKEW = 5.0
"""Seconds."""

SLOW = 0.5
"""A link or disk is slow below this share of the median."""

HOT = 85
"""Degrees Celsius."""

_GIGA = 1e9


@dataclass(frozen=True)
class Row:
    """One line of the table: what was checked, whether a run may start, and what was found."""

    name: str
    state: State
    detail: str


def is_go(rows: Iterable[Row]) -> bool:
    """Whether nothing failed."""
    return all(row.state != "fail" for row in rows)


def judge(
    answers: Answers,
    silent: Mapping[str, str],
    pool: Pool,
    window: tuple[float, float],
    *,
    checkpoint_bytes: int = 0,
) -> list[Row]:
    """Rows of everything but the links.

    Args:
        answers: of `neox.launch.probe`, by host.
        silent: hosts without an answer, and why.
        pool: hosts and slots of the run.
        window: our clock before and after the hosts were asked.
        checkpoint_bytes: about what one checkpoint takes.
    """
    rows = [_hosts(pool, silent)]
    if answers:
        rows += [_software(answers), *_gpus(answers, pool), _clocks(answers, window)]
        rows += [*_folders(answers, checkpoint_bytes), *_data(answers)]
    return rows


def _row(name: str, problems: list[str], fine: str, *, state: State = "fail") -> Row:
    return Row(name, state, "; ".join(problems)) if problems else Row(name, "ok", fine)


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """`n1, n2: reason`, one text for each reason."""
    hosts: dict[str, list[str]] = {}
    for host, reason in reasons.items():
        hosts.setdefault(reason, []).append(host)
    return [f"{', '.join(named)}: {reason}" for reason, named in hosts.items()]


def _hosts(pool: Pool, silent: Mapping[str, str]) -> Row:
    return _row("hosts answer", _by_reason(silent), f"{len(pool)} of {len(pool)}")


def _software(answers: Answers) -> Row:
    first = next(iter(answers.values()))
    found = {host: dict(answer["software"]) for host, answer in answers.items()}
    commit = f"commit {first['commit']}" if first["commit"] else "no commit known"
    fine = f"{commit}, torch {first['software']['torch']}, deepspeed {first['software']['deepspeed']}"
    return _row("code and packages", differences(found), fine)


def _gpus(answers: Answers, pool: Pool) -> list[Row]:
    errors = _by_reason(
        {host: answer["gpus"]["error"] for host, answer in answers.items() if "error" in answer["gpus"]}
    )
    if errors:
        return [_row("GPUs", errors, "")]
    counts = {host: len(answer["gpus"]) for host, answer in answers.items()}
    if not any(counts.values()):
        return [Row("GPUs", "warn", "none on any host: a run would use the CPU")]
    few = [
        f"{host} has {counts[host]} for {len(pool[host])} slots" for host in answers if counts[host] < len(pool[host])
    ]
    used = {
        host: [answer["gpus"][slot] for slot in pool[host] if slot < counts[host]] for host, answer in answers.items()
    }
    kinds: dict[str, list[str]] = {}
    for host, gpus in used.items():
        for gpu in gpus:
            kinds.setdefault(f"{gpu['name']} {gpu['memory_MiB']} MiB", []).append(host)
    mixed = [f"{kind} on {', '.join(dict.fromkeys(hosts))}" for kind, hosts in kinds.items()] if len(kinds) > 1 else []
    drivers = {host: {"driver": gpus[0]["driver"]} for host, gpus in used.items() if gpus}
    fine = f"{sum(map(len, used.values()))} x {next(iter(kinds), 'none')}"
    return [
        _row("GPUs", few + mixed + _ailing(used), fine),
        _row("GPUs' state", differences(drivers) + _busy(used), "cool, idle, one driver", state="warn"),
    ]


def _ailing(used: Mapping[str, list[dict[str, str]]]) -> list[str]:
    found = []
    for host, gpus in used.items():
        for number, gpu in enumerate(gpus):
            if gpu["uncorrected_errors"].isdigit() and int(gpu["uncorrected_errors"]) > 0:
                found.append(f"{host} GPU {number}: {gpu['uncorrected_errors']} uncorrected memory errors")
            if gpu["rows_to_remap"].lower() in ("yes", "1"):
                found.append(f"{host} GPU {number}: memory rows wait to be replaced, reset it")
    return found


def _busy(used: Mapping[str, list[dict[str, str]]]) -> list[str]:
    found = []
    for host, gpus in used.items():
        for number, gpu in enumerate(gpus):
            if gpu["temperature"].isdigit() and int(gpu["temperature"]) >= HOT:
                found.append(f"{host} GPU {number}: {gpu['temperature']} degrees")
            # The driver itself takes some hundreds of megabytes.
            if gpu["used_MiB"].isdigit() and int(gpu["used_MiB"]) > 2048:
                found.append(f"{host} GPU {number}: another program has {gpu['used_MiB']} MiB")
    return found


def _clocks(answers: Answers, window: tuple[float, float]) -> Row:
    """The clock of a host was read between `window`'s ends of our clock; what lies outside is certainly wrong."""
    skews = {h: max(window[0] - a["time"], a["time"] - window[1], 0.0) for h, a in answers.items()}
    wrong = [f"{host} is off by {skew:.1f} s or more" for host, skew in skews.items() if skew > MOST_CLOCK_SKEW]
    return _row("clocks", wrong, f"within {max(skews.values()) + window[1] - window[0]:.1f} s")


def _folders(answers: Answers, checkpoint_bytes: int) -> list[Row]:
    asked = {host: answer["save"] for host, answer in answers.items() if answer["save"] is not None}
    if not asked:
        return [Row("checkpoint folder", "warn", "not checked: no configuration given, or no `save` in it")]
    errors = _by_reason({host: found["error"] for host, found in asked.items() if "error" in found})
    if errors:
        return [_row("checkpoint folder", errors, "")]
    unseen = _unseen(answers)
    # The new one is written before an old one is removed.
    least = min(asked.values(), key=lambda found: found["free"])["free"]
    if least < 2 * checkpoint_bytes:
        unseen.append(
            f"{least / _GIGA:.1f} GB free, and two checkpoints take about {2 * checkpoint_bytes / _GIGA:.1f} GB"
        )
    rates = {host: found["rate"] for host, found in asked.items()}
    fine = f"{least / _GIGA:.1f} GB free, seen by all hosts"
    total = f"{sum(rates.values()) / _GIGA:.2f} GB/s, all hosts together"
    return [_row("checkpoint folder", unseen, fine), _row("write rate", _slow(rates), total, state="warn")]


def _unseen(answers: Answers) -> list[str]:
    found = []
    for host, answer in answers.items():
        missing = sorted(set(answers) - set(answer.get("marks", ())))
        if missing:
            found.append(f"{host} does not see what {', '.join(missing)} wrote there: it must be one folder for all")
    return found


def _data(answers: Answers) -> list[Row]:
    rows = []
    for prefix in next(iter(answers.values()))["data"]:
        found = {host: answer["data"][prefix] for host, answer in answers.items()}
        problems = _by_reason({host: files["error"] for host, files in found.items() if "error" in files})
        if not problems:
            problems = differences({host: {k: str(v) for k, v in files.items()} for host, files in found.items()})
        size = next(iter(found.values())).get("bin", 0) / _GIGA
        rows.append(_row(f"data {prefix.rpartition('/')[2]}", problems, f"{size:.2f} GB, .idx equal on all hosts"))
    return rows


def _slow(rates: Mapping[str, float]) -> list[str]:
    """What is far slower than the rest. Of two nobody can tell."""
    if len(rates) < 3:
        return []
    middle = median(rates.values())
    return [
        f"{name}: {rate / _GIGA:.2f} GB/s, where the median is {middle / _GIGA:.2f}"
        for name, rate in rates.items()
        if rate < SLOW * middle
    ]


def judge_links(found: Mapping[str, Any] | None, failed: Mapping[str, str]) -> list[Row]:
    """Rows of the all-reduce and the links.

    Args:
        found: what `neox.parallel.links` measured, None if it came to no end.
        failed: hosts on which it failed, and why.
    """
    if found is None:
        reasons = list(dict.fromkeys(failed.values())) or ["no answer"]
        return [Row("all-reduce", "fail", "; ".join(reasons))]
    reduce = found["reduce"]
    wrong = [] if reduce["right"] else ["the sum over ranks is wrong"]
    rates: dict[str, float] = {}
    several = any(slot for _, _, slot, _ in found["links"])
    for one, other, slot, rate in found["links"]:
        rates[f"{one} - {other}" + (f" (GPU {slot})" if several else "")] = rate
    broken = [f"{name}: messages arrive changed" for name, rate in rates.items() if rate == 0]
    rows = [_row("all-reduce", wrong, f"right; {reduce['rate'] / _GIGA:.2f} GB/s over {found['library']}")]
    if rates:
        slowest = min(rates, key=lambda name: rates[name])
        fine = f"{len(rates)} measured; slowest {slowest}: {rates[slowest] / _GIGA:.2f} GB/s"
        rows.append(_row("links", broken + _slow(rates), fine))
    return rows
