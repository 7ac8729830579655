"""Names that command lines offer, apart from what they name: `--help` need not import torch for them."""

TOKENIZER_TYPES = (
    "GPT2BPETokenizer",
    "HFTokenizer",
    "HFGPT2Tokenizer",
    "SPMTokenizer",
    "CharLevelTokenizer",
    "TiktokenTokenizer",
)
"""Kinds of tokenizer, as `tokenizer_type` has them."""

ARCHITECTURES = (
    "neox",
    "llama",
    "mistral",
    "mixtral",
    "falcon",
    "opt",
    "bloom",
    "gpt2",
)
"""Classes of transformers that a model is exported to; the first that can express it comes first."""

FORMATS = ("sequential", "pipeline", "native")
"""Formats of checkpoints that are written: two of GPT-NeoX's, and ours."""

LOGITS_BATCH_SIZE = 4
"""Sequences whose logits are computed together."""
