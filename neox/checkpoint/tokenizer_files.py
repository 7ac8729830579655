"""A tokenizer in the files that `transformers` opens."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers

from neox.config import TokenizerConfig
from neox.data.tokenizers import build_tokenizer
from neox.data.tokenizers.base import END_OF_DOCUMENT, PADDING
from neox.data.tokenizers.fast import gpt2_model, hf_tokenizer
from neox.data.tokenizers.special_tokens import TOKENIZER_CONFIG, tokens_in
from neox.errors import CheckpointError

FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
BEGINNINGS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
"""What vocabularies call the beginning of a text."""


@dataclass(frozen=True)
class ExportedTokenizer:
    """What goes into an exported model besides its weights.

    Attributes:
        files: name -> text.
        token_ids: `bos_token_id`, `eos_token_id` and, where there is one, `pad_token_id`.
        ends: every token that ends a text, `eos_token_id` first; empty where that is the only one known.
    """

    files: dict[str, str]
    token_ids: dict[str, int | None]
    ends: tuple[int, ...] = ()


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
        from_huggingface: `vocab_file` is a folder (or a file in one) that transformers wrote; copy it as it is, as
            is done without being told where a tokenizer_config.json lies beside a tokenizer.json.
        pad_token_id: overrides the tokenizer's padding token.
        model_max_length: tokens the model was trained on, for the tokenizer's warning about longer texts.

    Raises:
        UserError: a file is missing, or this type of tokenizer has no such form.
    """
    if from_huggingface or _is_copy(options):
        return _copied(options, pad_token_id=pad_token_id)
    tokens = special_tokens(options, pad_token_id=pad_token_id)
    ids, text = tokens.token_ids, _tokenizer_json(options)
    vocabulary = tokenizers.Tokenizer.from_str(text)
    special = {added.content for added in vocabulary.get_added_tokens_decoder().values() if added.special}
    beginning = next((token for token in BEGINNINGS if token in special), None)
    if beginning is not None:
        ids["bos_token_id"] = vocabulary.token_to_id(beginning)
    named: dict[str, Any] = {
        key.removesuffix("_id"): vocabulary.id_to_token(number) for key, number in ids.items() if number is not None
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
        **named,
    }
    return replace(tokens, files={"tokenizer.json": text, TOKENIZER_CONFIG: json.dumps(settings, indent=2)})


def special_tokens(options: TokenizerConfig, *, pad_token_id: int | None = None) -> ExportedTokenizer:
    """Special tokens of a run without the files: documents end, and so begin, with its end-of-document token.

    Those of a tokenizer that transformers wrote are what its files say.

    Raises:
        UserError: a file of the tokenizer is missing, or it has no token that ends a document.
    """
    if _is_copy(options):
        return replace(_copied(options, pad_token_id=pad_token_id), files={})
    tokenizer = build_tokenizer(options)
    pad = tokenizer.pad if pad_token_id is None and tokenizer.pad != tokenizer.eod else pad_token_id
    ids: dict[str, int | None] = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod}
    ends = tuple(dict.fromkeys((tokenizer.eod, *tokenizer.ends)))
    return ExportedTokenizer({}, ids | ({} if pad is None else {"pad_token_id": pad}), ends)


def _is_copy(options: TokenizerConfig) -> bool:
    path = Path(options.vocab_file or "")
    beside = path.with_name(TOKENIZER_CONFIG) if path.name == "tokenizer.json" else None
    return options.tokenizer_type == "HFTokenizer" and beside is not None and beside.is_file()


def _tokenizer_json(options: TokenizerConfig) -> str:
    match options.tokenizer_type, options.vocab_file, options.merge_file:
        case "HFTokenizer", str(path), _:
            return Path(path).read_text(encoding="utf-8-sig")
        case "GPT2BPETokenizer", str(path), str(merges):
            return _gpt2_json(path, merges)
    raise CheckpointError(
        f"tokenizer_type {options.tokenizer_type} has no tokenizer.json; export without it (--no_save_tokenizer)"
    )


def _gpt2_json(vocab_file: str, merge_file: str) -> str:
    """GPT-2's byte-level BPE as one JSON, tokenizing as `neox.data` does."""
    backend = tokenizers.Tokenizer(gpt2_model(Path(vocab_file), Path(merge_file))[0])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([t for t in (END_OF_DOCUMENT, PADDING) if backend.token_to_id(t) is not None])
    return backend.to_str(pretty=True)


def _copied(options: TokenizerConfig, *, pad_token_id: int | None) -> ExportedTokenizer:
    path = Path(options.vocab_file or ".")
    folder = path if path.is_dir() else path.parent
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"vocab_file: {folder} has no tokenizer.json; name a folder that transformers saved")
    ends = hf_tokenizer(folder / "tokenizer.json").ends
    files = {name: _text(folder / name) for name in FILES if (folder / name).is_file()}
    vocabulary = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    named = tokens_in(folder, vocabulary.token_to_id)
    ids: dict[str, int | None] = {"bos_token_id": named.bos, "eos_token_id": ends[0] if ends else None}
    pad = named.pad if pad_token_id is None else pad_token_id
    return ExportedTokenizer(files, ids | {"pad_token_id": pad}, ends)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8 text; copy it again, or remove it") from None
