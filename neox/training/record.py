"""The record of a run: with what code, configuration, packages, hosts and environment a process group began."""

import json
import os
import platform
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import yaml

from neox.checkpoint.native.manifest import Progress
from neox.config import Config
from neox.files import flush
from neox.parallel.mesh import Mesh
from neox.secrets import masked_text, masked_variables
from neox.training.origin import load_folder
from neox.training.team import team_of, tell
from neox.versions import changes, commit, software

MOST_PATCH_BYTES = 8 * 2**20

RUN, PATCH = "run.json", "changes.patch"


def keep_record(config: Config, mesh: Mesh, progress: Progress) -> None:
    """Write `record/<start>-<process>/` into `save`, or `log_dir`; a collective. A failure is a warning.

    Args:
        config: as it runs.
        mesh: this rank's place.
        progress: where the run begins or goes on.
    """
    root = config.checkpoint.save or config.logging.log_dir
    if root is None:
        return
    ranks = team_of(mesh).gather(_own_place(mesh))
    if mesh.rank != 0:
        return
    started = time.gmtime()
    final = Path(root) / "record" / f"{time.strftime('%Y%m%dT%H%M%SZ', started)}-{os.getpid()}"
    try:
        content = _described(config, mesh, progress, ranks, started)
        _write(final, config, content, changes(MOST_PATCH_BYTES))
    except Exception as error:  # whatever it is, it is no reason not to train
        tell(mesh, f"{final}: the record of the run cannot be written ({' '.join(str(error).split())})")


def _own_place(mesh: Mesh) -> dict[str, str]:
    """What is known of this rank's host and device alone."""
    found = {"host": socket.gethostname(), "device": "cpu"}
    if mesh.device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(mesh.device)
        found["driver"] = _driver()
    return found


def _driver() -> str:
    """Version of the NVIDIA driver, as the kernel tells."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().partition("Kernel Module")[2].split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[0].isdigit()), "unknown")


def _described(
    config: Config, mesh: Mesh, progress: Progress, ranks: list[dict[str, str]], started: time.struct_time
) -> dict[str, Any]:
    folder = load_folder(config)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
        "command": masked_text(shlex.join([sys.executable, *sys.argv])),
        "folder": str(Path.cwd()),
        "process": os.getpid(),
        "goes_on_from": None if folder is None else str(folder),
        "iteration": progress.iteration,
        "consumed_samples": progress.consumed_samples,
        "layout": {
            "world_size": mesh.world_size,
            "pipeline": mesh.pipe_size,
            "data": mesh.data_size,
            "tensor": mesh.tensor_size,
            "zero_stage": config.parallel.zero_stage,
            "train_batch_size": config.batch.train_batch_size,
        },
        "code": {"folder": str(Path(__file__).resolve().parents[2]), "commit": commit(), **_source()},
        "hosts": hosts_of(ranks),
        "system": platform.platform(),
        "torch": _torch(),
        "packages": packages(),
        "environment": masked_variables(os.environ),
    }


def _source() -> dict[str, str]:
    found = software()
    return {"python": found["python"], "neox source": found["neox source"]}


def _torch() -> dict[str, Any]:
    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        found["cudnn"] = torch.backends.cudnn.version()
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def packages() -> dict[str, str]:
    """Version of every package that is installed."""
    metadata = [package.metadata for package in distributions()]  # read from its file at each look
    found = {one["Name"]: one["Version"] for one in metadata if one["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def hosts_of(ranks: list[dict[str, str]]) -> dict[str, dict[str, Any]]:
    """Hosts by name, each with its ranks and what it computes on."""
    hosts: dict[str, dict[str, Any]] = {}
    for rank, found in enumerate(ranks):
        host = hosts.setdefault(found["host"], {"ranks": [], "devices": []})
        host["ranks"].append(rank)
        host["devices"].append(found["device"])
        if "driver" in found:
            host["driver"] = found["driver"]
    return hosts


def _write(final: Path, config: Config, content: Mapping[str, Any], patch: str | None) -> None:
    """Write all files of a record beside its place, then give it its name."""
    temporary = final.with_name(f".{final.name}.incomplete")
    texts = {f"given/{Path(name).name}": masked_text(text) for name, text in config.files.items()}
    texts["config.yml"] = masked_text(_yaml(config.to_flat()))
    texts["resolved.yml"] = masked_text(_yaml(config.to_flat(resolved=True)))
    if patch:
        texts[PATCH] = patch
    texts[RUN] = json.dumps(content, indent=1, ensure_ascii=False)
    try:
        for name, text in texts.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            flush(path)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=True, allow_unicode=True)
