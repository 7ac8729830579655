"""Where the oracle files are, and what made them: 100 short documents, indexed by upstream's own code."""

import json
import shutil
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data" / "indexed"
TEXT = "enwik100_text_document"
LABEL = "enwik100_label_document"


def read_json(name: str) -> Any:
    """Return one of the oracle JSON files."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def copy_corpus(folder: Path, *, names: tuple[str, ...] = (TEXT, LABEL)) -> Path:
    """Copy corpora to a folder where sample orders may be written; return the prefix of the first."""
    for name in names:
        for suffix in (".bin", ".idx"):
            shutil.copy(FOLDER / f"{name}{suffix}", folder)
    return folder / names[0]
