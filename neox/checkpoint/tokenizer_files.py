"""A tokenizer in the files that `transformers` opens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from neox.config import TokenizerConfig
from neox.data.tokenizers import build_tokenizer
from neox.data.tokenizers.base import END_OF_DOCUMENT, PADDING
from neox.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class ExportedTokenizer:
    """What goes into an exported model besides its weights.

    Attributes:
        files: name -> text.
        token_ids: `bos_token_id`, `eos_token_id` and, where there is one, `pad_token_id`.
    """

    files: dict[str, str]
    token_ids: dict[str, int | None]


def export_tokenizer(
    options: TokenizerConfig,
    *,
    from_huggingface: bool = False,
    pad_token_id: int | None = None,
    model_max_length: int,
) -> ExportedTokenizer:
    """Read the tokenizer of a run in Hugging Face's form.

    Args:
        options: the tokenizer of the run.
        from_huggingface: `vocab_file` is a folder (or a file in one) that transformers wrote; copy it as it is.
        pad_token_id: overrides the tokenizer's padding token.
        model_max_length: tokens the model was trained on, for the tokenizer's warning about longer texts.

    Raises:
        UserError: a file is missing, or this type of tokenizer has no such form.
    """
    if from_huggingface:
        return _copied(Path(options.vocab_file or "."), pad_token_id=pad_token_id)
    tokenizer = build_tokenizer(options)
    pad = tokenizer.pad if pad_token_id is None and tokenizer.pad != tokenizer.eod else pad_token_id
    ids: dict[str, int | None] = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod}
    ids |= {} if pad is None else {"pad_token_id": pad}
    text = _tokenizer_json(options)
    vocabulary = tokenizers.Tokenizer.from_str(text)
    named: dict[str, Any] = {
        key.removesuffix("_id"): vocabulary.id_to_token(number) for key, number in ids.items() if number is not None
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **named,
    }
    return ExportedTokenizer({"tokenizer.json": text, "tokenizer_config.json": json.dumps(settings, indent=2)}, ids)


def _tokenizer_json(options: TokenizerConfig) -> str:
    match options.tokenizer_type, options.vocab_file, options.merge_file:
        case "HFTokenizer", str(path), _:
            return Path(path).read_text(encoding="utf-8")
        case "GPT2BPETokenizer", str(path), str(merges):
            return _gpt2_json(path, merges)
    raise CheckpointError(
        f"tokenizer_type {options.tokenizer_type} has no tokenizer.json; export without it (--no_save_tokenizer)"
    )


def _gpt2_json(vocab_file: str, merge_file: str) -> str:
    """GPT-2's byte-level BPE as one JSON, tokenizing as `neox.data` does."""
    backend = tokenizers.Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([t for t in (END_OF_DOCUMENT, PADDING) if backend.token_to_id(t) is not None])
    return backend.to_str(pretty=True)


def _copied(path: Path, *, pad_token_id: int | None) -> ExportedTokenizer:
    folder = path if path.is_dir() else path.parent
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"vocab_file: {folder} has no tokenizer.json; name a folder that transformers saved")
    files = {name: (folder / name).read_text(encoding="utf-8") for name in FILES if (folder / name).is_file()}
    vocabulary = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    ids = {f"{key}_id": _token_id(vocabulary, settings.get(key)) for key in ("bos_token", "eos_token", "pad_token")}
    if pad_token_id is not None:
        ids["pad_token_id"] = pad_token_id
    return ExportedTokenizer(files, ids)


def _token_id(vocabulary: tokenizers.Tokenizer, token: Any) -> int | None:
    """Id of a special token, which settings spell as text or as {"content": text}."""
    text = token.get("content") if isinstance(token, dict) else token
    return None if text is None else vocabulary.token_to_id(text)
