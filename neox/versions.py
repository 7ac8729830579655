"""Which code and packages this process runs: hosts of one run must agree on them, and checkpoints record them."""

import hashlib
import platform
import shutil
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "deepspeed", "megatron-core", "numpy", "pydantic", "safetensors", "tokenizers", "transformers")
"""Packages whose versions change results or files."""


@cache
def software() -> dict[str, str]:
    """Versions by name: python, the packages that are installed, and the content of our own source files."""
    found = {"python": platform.python_version(), "neox source": source_digest(Path(__file__).parent)}
    for name in PACKAGES:
        found[name] = package_version(name) or "missing"
    return found


def package_version(name: str) -> str | None:
    """Version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def commit() -> str | None:
    """Commit of the code, with `+` where files that git knows were changed; None outside a repository."""
    name, changed = _git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if name is None or changed is None else name.strip() + ("+" if changed else "")


def changes(most_bytes: int) -> str | None:
    """What differs from the commit in the files that git knows, as a patch; None where nothing does or it is longer."""
    patch = _git("diff", "--binary", "HEAD")
    return patch if patch and len(patch.encode()) <= most_bytes else None


def _git(*words: str) -> str | None:
    """What git says of the code; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), *words]
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def source_digest(folder: Path) -> str:
    """Twelve digits that change with any Python file under `folder`, wherever the folder lies."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def differences(by_host: dict[str, dict[str, str]]) -> list[str]:
    """What is not the same everywhere: `"torch: 2.11 on n1, n2; 2.13 on n3"`, one text for each name."""
    lines = []
    names = sorted({name for found in by_host.values() for name in found})
    for name in names:
        hosts: dict[str, list[str]] = {}
        for host, found in by_host.items():
            hosts.setdefault(found.get(name, "missing"), []).append(host)
        if len(hosts) > 1:
            places = "; ".join(f"{value} on {', '.join(on)}" for value, on in hosts.items())
            lines.append(f"{name}: {places}")
    return lines
