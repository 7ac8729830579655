"""Hugging Face's format, both ways, for each family in `detect.FAMILIES`."""

from neox.checkpoint.huggingface.detect import FAMILIES, family_of
from neox.checkpoint.huggingface.files import INDEX
from neox.checkpoint.huggingface.read import HuggingFaceReader, is_huggingface
from neox.checkpoint.huggingface.write import SHARD_BYTES, HuggingFaceWriter, export_huggingface

__all__ = [
    "FAMILIES",
    "INDEX",
    "SHARD_BYTES",
    "HuggingFaceReader",
    "HuggingFaceWriter",
    "export_huggingface",
    "family_of",
    "is_huggingface",
]
