"""Special tokens that are named in files next to a tokenizer, as transformers writes them for a model."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neox.downloads import failed_download
from neox.errors import DataError

TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS = "special_tokens_map.json"
_MODEL_SETTINGS = ("generation_config.json", "config.json")

VOCABULARIES = ("tokenizer.json", "tokenizer.model")
"""What transformers calls the vocabulary: files beside one of another name may belong to anything."""


@dataclass(frozen=True)
class NamedTokens:
    """Ids of the special tokens of a model; None where nothing names one.

    Attributes:
        bos: begins a text.
        eos: ends a text.
        pad: fills up batches.
        ends: every token that ends a text, `eos` first if there is one. A chat model has several: the end of a turn
            and the end of a document.
    """

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    ends: tuple[int, ...] = ()


def tokens_beside(vocabulary: Path, token_to_id: Callable[[str], int | None]) -> NamedTokens:
    """Read the files beside a vocabulary; nothing is named where its own name is not in VOCABULARIES.

    Raises:
        DataError: one of them is malformed.
    """
    return tokens_in(vocabulary.parent, token_to_id) if vocabulary.name in VOCABULARIES else NamedTokens()


def tokens_in(folder: Path, token_to_id: Callable[[str], int | None]) -> NamedTokens:
    """Read the files of a folder that transformers wrote.

    Raises:
        DataError: one of them is malformed.
    """
    settings = _json(folder / _SPECIAL_TOKENS) | _json(folder / TOKENIZER_CONFIG)
    bos, eos, pad = (_token_id(settings.get(f"{key}_token"), token_to_id) for key in ("bos", "eos", "pad"))
    first = () if eos is None else (eos,)
    return NamedTokens(bos, eos, pad, tuple(dict.fromkeys((*first, *end_ids(folder)))))


def end_ids(folder: Path) -> tuple[int, ...]:
    """Tokens at which a model of transformers ends a text: `eos_token_id`, which may be a list.

    generation_config.json counts and config.json where that says nothing, as `generate` of transformers has it.

    Raises:
        DataError: a file is malformed.
    """
    for name in _MODEL_SETTINGS:
        found = _json(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(number) is int for number in ids):
            raise DataError(f"{folder / name}: eos_token_id: {found!r} is neither an id nor a list of ids; correct it")
        if ids:
            return tuple(ids)
    return ()


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    except (ValueError, RecursionError) as error:
        found = failed_download(path) or f"not valid JSON ({error}); copy it again"
        raise DataError(f"{path}: {found}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds no JSON object; copy it again")
    return content


def _token_id(token: Any, token_to_id: Callable[[str], int | None]) -> int | None:
    """Id of a special token, which settings spell as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    return token_to_id(text) if isinstance(text, str) else None
