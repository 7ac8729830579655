"""A checkpoint as a Hugging Face folder: of any format by `convert_neox_to_hf.py`, of each save by `save_hf`."""

import importlib.util
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from neox.checkpoint.conversion.convert import lacking_memory, largest_logit_difference
from neox.checkpoint.described import progress_of
from neox.checkpoint.huggingface import HuggingFaceWriter, family_of
from neox.checkpoint.huggingface.card import model_card
from neox.checkpoint.lora import merged
from neox.checkpoint.native.store import NativeReader
from neox.checkpoint.tokenizer_files import ExportedTokenizer, export_tokenizer, special_tokens
from neox.checkpoint.weights import WeightReader
from neox.config import Config
from neox.errors import CheckpointError, DataError, UserError
from neox.model.build import DTYPES

BESIDE = "hf"
"""Name of the folder that `save_hf` makes in a checkpoint."""

NOT_COMPARED = "not compared"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Export:
    """What is asked of an export.

    Attributes:
        precision: fp16, bf16 or fp32; `auto` for the run's.
        architecture: a name in `huggingface.FAMILIES`; None for the first that can express the model.
        save_tokenizer: write the tokenizer's files too.
        tokenizer_is_huggingface: see `export_tokenizer`.
        pad_token_id: see `export_tokenizer`.
        check: compare logits with transformers, where both models fit into memory.
        dry_run: write nothing.
    """

    precision: str = "auto"
    architecture: str | None = None
    save_tokenizer: bool = True
    tokenizer_is_huggingface: bool = False
    pad_token_id: int | None = None
    check: bool = True
    dry_run: bool = False


def export(weights: WeightReader, config: Config, out: Path, asked: Export, *, name: str = "") -> Iterator[str]:
    """Write a Hugging Face folder; one tensor is in memory at a time until the comparison.

    Args:
        weights: the trained weights.
        config: of their run, its vocabulary settled.
        out: the folder to make.
        asked: how.
        name: of the model, for its card; default: the folder's.

    Yields:
        Lines on what was done, or would be.

    Raises:
        UserError: transformers has no such model, the tokenizer no such form, or the export computes something else.
    """
    model = config.model
    if asked.pad_token_id is not None and asked.pad_token_id >= (model.padded_vocab_size or math.inf):
        raise CheckpointError(
            f"--pad-token-id {asked.pad_token_id}: not below the {model.padded_vocab_size} rows of the vocabulary"
        )
    precision = {"auto": model.precision, "bf16": "bfloat16"}.get(asked.precision, asked.precision)
    writer = HuggingFaceWriter(model, dtype=DTYPES[precision], architecture=asked.architecture)
    tokenizer = _tokenizer(config, asked)
    if asked.dry_run:
        files = writer.files()
        yield from (f"{size:>16,}  {file}" for file, size in files.items())
        yield f"would write {out}: {weights.folder} as {writer.family.architecture} in {precision}"
        return
    card = model_card(
        config,
        writer.family,
        name=name or out.name,
        precision=precision,
        iteration=progress_of(weights).iteration,
        tokenizer=tokenizer,
    )
    writer.write(weights, out, tokenizer=tokenizer, card=card)
    yield f"{out}: {weights.folder} as {writer.family.architecture} in {precision}"
    if asked.check:
        lacking = lacking_memory(model)
        if lacking:
            yield f"{NOT_COMPARED} with transformers: {lacking}"
            return
        difference = largest_logit_difference(out, weights, model, dtype=DTYPES[precision])
        yield f"largest logit difference to transformers: {difference:.3g}"


def _tokenizer(config: Config, asked: Export) -> ExportedTokenizer | None:
    if asked.save_tokenizer:
        try:
            return export_tokenizer(
                config.tokenizer,
                from_huggingface=asked.tokenizer_is_huggingface,
                pad_token_id=asked.pad_token_id,
                model_max_length=config.model.max_position_embeddings,
            )
        except DataError as error:
            raise CheckpointError(f"{error}; or leave the tokenizer out (--no_save_tokenizer)") from None
    try:
        return special_tokens(config.tokenizer, pad_token_id=asked.pad_token_id)
    except UserError as error:  # a run's tokenizer is not always at hand, and was not asked for
        logger.warning("config.json names no tokens that begin or end a text: %s", error)
        ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None}
        return ExportedTokenizer({}, ids if asked.pad_token_id is None else ids | {"pad_token_id": asked.pad_token_id})


def check_exportable(config: Config) -> None:
    """See, before a run starts, that its checkpoints can be Hugging Face folders too.

    Raises:
        CheckpointError: transformers has no such model, or is not installed.
    """
    family_of(config.model)
    if importlib.util.find_spec("transformers") is None:
        raise CheckpointError("save_hf: needs transformers to compare logits: pip install transformers, or set it off")


def export_beside(folder: Path, config: Config) -> None:
    """Make `folder/hf` from the native checkpoint in `folder`, and compare its logits in this process.

    The comparison loads the model in fp32, first there and then here; where that does not fit into memory it is left
    out, and a warning says so. A tokenizer that has no files of that kind is left out too.

    Args:
        folder: a native checkpoint, complete but perhaps not yet under its name.
        config: of the run, its vocabulary settled.

    Raises:
        CheckpointError: it cannot be written, or computes something else.
    """
    weights = merged(NativeReader(folder))
    asked = Export(save_tokenizer=not lacking_tokenizer(config))
    *_, last = export(weights, config, folder / BESIDE, asked, name=Path(config.checkpoint.save or folder).name)
    if last.startswith(NOT_COMPARED):
        logger.warning("%s: %s", BESIDE, last)


def lacking_tokenizer(config: Config) -> str:
    """Why `export_beside` leaves the tokenizer out; empty where it does not."""
    try:
        export_tokenizer(config.tokenizer, model_max_length=config.model.max_position_embeddings)
    except UserError as error:
        return str(error)
    return ""
