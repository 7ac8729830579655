"""The findings of `neox.checkpoint.inspection.contents` as lines to read, and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from neox.checkpoint.inspection.contents import Difference, TensorFacts


def described(about: Mapping[str, Any]) -> list[str]:
    """Where a checkpoint is and what it says of itself."""
    words = [f"{key} {value:,}" if key == "bytes" else f"{key} {value}" for key, value in about.items()]
    return [words[0].removeprefix("folder "), f"  {', '.join(words[1:])}"]


def tree(tensors: Sequence[TensorFacts]) -> list[str]:
    """Layers and their tensors, and what they are together."""
    lines, layer = [], ""
    width = max((len(_local(tensor.name)) for tensor in tensors), default=0)
    for tensor in tensors:
        if _layer(tensor.name) != layer:
            layer = _layer(tensor.name)
            lines.append(f"  {layer}")
        bad = f", {tensor.not_finite:,} NOT FINITE" if tensor.not_finite else ""
        numbers = f"norm {tensor.norm:<10.4g} largest {tensor.largest:.4g}{bad}"
        lines.append(f"    {_local(tensor.name):{width}}  {_shape(tensor.shape):16} {tensor.dtype:9} {numbers}")
    size, count = sum(tensor.bytes for tensor in tensors), sum(math.prod(tensor.shape) for tensor in tensors)
    norm = math.hypot(*(tensor.norm for tensor in tensors))
    return [*lines, f"  {len(tensors)} tensors, {count:,} parameters, {size:,} bytes, norm {norm:.6g}"]


def comparison(found: Sequence[Difference], *, compared: int) -> list[str]:
    """The tensors that differ, and how many do."""
    width = max((len(difference.name) for difference in found), default=0)
    lines = []
    for difference in found:
        if difference.kind == "values":
            one, other = difference.norms
            what = f"largest {difference.largest:.4g}  norm {difference.norm:.4g}  of {one:.4g} and {other:.4g}"
        else:
            what = " and ".join(_shape(shape) for shape in difference.shapes if shape is not None)
        lines.append(f"  {difference.name:{width}}  {difference.kind:18} {what}")
    return [*lines, f"  {len(found)} of {compared} tensors differ" if found else f"  all {compared} tensors are equal"]


def as_json(finding: TensorFacts | Difference) -> dict[str, Any]:
    """A finding as JSON has it: infinity, which JSON lacks, is null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(finding).items()
    }


def _layer(name: str) -> str:
    return ".".join(name.split(".", 2)[:2])


def _local(name: str) -> str:
    return name.split(".", 2)[2]


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"
