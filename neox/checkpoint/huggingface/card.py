"""The model card: README.md of an exported folder, from what the configuration says and nothing more."""

from collections.abc import Iterable
from pathlib import Path

from neox import __version__
from neox.checkpoint.huggingface.family import DTYPE_NAMES, Family
from neox.checkpoint.tokenizer_files import ExportedTokenizer
from neox.checkpoint.weight_map import Kind, weight_map
from neox.config import Config, ModelConfig

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
license: unknown
tags:
- neox
---
"""

USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)
print(tokenizer.decode(tokens[0]))
```
"""

LICENCE = """## Licence and limits

The licence is not stated in the configuration this card was made from: whoever publishes the model puts it in the
header above. The configuration also does not tell what is in the training data, nor how the model was evaluated. A
language model repeats what its data contain, mistakes and prejudice included.
"""


def model_card(
    config: Config,
    family: Family,
    *,
    name: str,
    precision: str,
    iteration: int = 0,
    tokenizer: ExportedTokenizer | None = None,
) -> str:
    """Write the card of an export.

    Args:
        config: of the training run, its vocabulary resolved.
        family: the class of transformers it was exported as.
        name: of the model.
        precision: type of the exported weights, as our key names it.
        iteration: of the run; 0 where it is not known.
        tokenizer: as exported, if it was.
    """
    sections = [
        HEADER,
        f"# {name}\n\nA causal language model, exported with neox {__version__} from "
        + (f"iteration {iteration:,} of its training.\n" if iteration else "a checkpoint.\n"),
        "## Model\n\n" + _table(_model_rows(config.model, family, precision)),
    ]
    for title, rows in (("Tokenizer", _tokenizer_rows(config, tokenizer)), ("Training", _training_rows(config))):
        if rows:
            sections.append(f"## {title}\n\n" + _table(rows))
    if tokenizer is not None and tokenizer.files:
        sections.append(USE.format(name=name))
    return "\n".join([*sections, LICENCE])


def _model_rows(model: ModelConfig, family: Family, precision: str) -> list[tuple[str, str]]:
    tensors = weight_map(model).values()
    total = sum(tensor.shape.numel() for tensor in tensors)
    ends = sum(tensor.shape.numel() for tensor in tensors if tensor.kind is Kind.VOCABULARY)
    heads = f"{model.num_attention_heads} of {model.head_dim}"
    shared = f", {model.num_kv_heads} of keys and values" if model.is_grouped else ""
    residual = "parallel" if model.gpt_j_residual else "sequential"
    return [
        ("Class in transformers", f"`{family.architecture}`"),
        ("Parameters", f"{total:,}, {total - ends:,} without embeddings and head"),
        ("Layers", f"{model.num_layers}"),
        ("Width", f"{model.hidden_size:,}, {model.mlp_inner_width:,} inside the MLP"),
        *([("Experts", f"{model.moe_num_experts}, {model.moe_top_k} for a token")] if model.has_experts else []),
        ("Heads", heads + shared),
        ("Context", f"{model.seq_length:,} tokens"),
        ("Vocabulary", f"{model.padded_vocab_size:,} rows"),
        ("Block", f"{model.norm}, {model.activation}, {residual} residual"),
        ("Positions", _positions(model)),
        ("Embeddings and head", "separate" if model.no_weight_tying else "tied"),
        ("Type of weights", DTYPE_NAMES[precision]),
    ]


def _positions(model: ModelConfig) -> str:
    if model.pos_emb != "rotary":
        return model.pos_emb
    kind = (model.rope_scaling or {}).get("rope_type")
    scaling = f", scaling {kind}" if kind else ""
    return f"rotary, {model.rotary_pct:.0%} of a head, base {model.rotary_emb_base:,.0f}{scaling}"


def _tokenizer_rows(config: Config, tokenizer: ExportedTokenizer | None) -> list[tuple[str, str]]:
    if tokenizer is None:
        return []
    named = {key.removesuffix("_token_id"): value for key, value in tokenizer.token_ids.items() if value is not None}
    rows: list[tuple[str, str]] = [("Type", config.tokenizer.tokenizer_type)]
    if named:
        rows.append(("Special tokens", ", ".join(f"{key} {value}" for key, value in named.items())))
    return rows


def _training_rows(config: Config) -> list[tuple[str, str]]:
    """What of the run is set; files by their names, whose folders are nobody's business."""
    data, batch = config.data, config.batch
    paths = [data.data_path] if data.data_path else list(data.train_data_paths or ())
    rows = [("Data", _names(paths))] if paths else []
    if config.training.train_iters:
        rows.append(("Iterations planned", f"{config.training.train_iters:,}"))
    if batch.train_batch_size and paths:
        rows.append(("Sequences of a batch", f"{batch.train_batch_size:,}"))
    if config.optimizer.is_given:
        rows.append(("Optimizer", f"{config.optimizer.type}, learning rate {config.optimizer.lr:g}"))
    return rows


def _names(paths: Iterable[str]) -> str:
    return ", ".join(f"`{Path(path).name}`" for path in paths)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)
