"""The data and the tokenizer."""

from typing import Literal

from neox.config.keys import Float, Floats, Int, Section, Strings, Text, internal, setting

SPLITS = ("train", "valid", "test")
OF_FILES = ("GPT2BPETokenizer", "HFTokenizer", "SPMTokenizer")
"""Kinds of tokenizer whose vocabulary is a file; the others have none, or take a name."""


class DataConfig(Section):
    """Which indexed files are read, and how documents become samples."""

    data_path: Text | None = setting(
        None,
        "Prefix of one indexed dataset, cut up by split.",
        rule="Not together with train_, valid_ and test_data_paths.",
    )
    train_data_paths: Strings | None = setting(
        None,
        "Prefixes of the training datasets.",
        rule="All three of train_, valid_ and test_data_paths, or data_path.",
    )
    valid_data_paths: Strings | None = setting(
        None, "Prefixes of the validation datasets.", rule="With train_ and test_data_paths."
    )
    test_data_paths: Strings | None = setting(
        None, "Prefixes of the test datasets.", rule="With train_ and valid_data_paths."
    )
    train_label_data_paths: Strings | None = setting(
        None, "Prefixes of the training labels.", rule="As many as train_data_paths."
    )
    valid_label_data_paths: Strings | None = setting(
        None, "Prefixes of the validation labels.", rule="As many as valid_data_paths."
    )
    test_label_data_paths: Strings | None = setting(
        None, "Prefixes of the test labels.", rule="As many as test_data_paths."
    )
    train_data_weights: Floats | None = setting(
        None,
        "Weights of the training datasets; absent: equal.",
        rule="As many as train_data_paths, at least 0, not all 0; their sum does not matter.",
    )
    valid_data_weights: Floats | None = setting(
        None, "Weights of the validation datasets; absent: equal.", rule="As many as valid_data_paths."
    )
    test_data_weights: Floats | None = setting(
        None, "Weights of the test datasets; absent: equal.", rule="As many as test_data_paths."
    )
    weight_by_num_documents: bool = setting(
        False, "Take the weights from the numbers of documents.", rule="Overrides the three lists of weights."
    )
    weighted_sampler_alpha: Float = setting(
        1.0,
        "Exponent of weight_by_num_documents.",
        ge=0,
        rule="Used with weight_by_num_documents: weights are p^alpha (1 - p), with p a dataset's share of documents.",
    )
    data_impl: Literal["infer", "mmap", "cached"] = setting("infer", "Format of the indexed files.")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = setting(
        "packed",
        "How documents are laid into samples.",
        rule="unpacked needs label datasets; train_epochs needs packed.",
    )
    allow_chopped: bool = setting(
        True, "Allow documents cut at a sample's end; packed always cuts.", rule="Used when pack_impl is not packed."
    )
    mmap_warmup: bool = setting(False, "Read each data file whole once, to fill the page cache.")
    split: str = setting(
        "969, 30, 1",
        "Proportions of training, validation and test in data_path.",
        rule="Up to three numbers, normalised; used with data_path only.",
    )
    num_workers: Int = setting(2, "Loader processes of each process.", ge=0)
    use_shared_fs: bool = setting(True, "Sample maps are built once for all hosts, not once a host.")
    eod_mask_loss: bool = setting(
        False,
        "Mask the loss where the input is the tokenizer's end-of-document token.",
        rule="Every such token counts: if it ends each turn of a conversation too, the loss is masked after each turn.",
    )
    document_masking: bool = setting(
        False,
        "Keep the documents of a packed row apart: tokens attend within their own document only, and positions begin "
        "at 0 in each.",
        rule="Documents are those of the index, whatever token they end with. The loss is not changed: set "
        "eod_mask_loss too, so that no document is trained to predict the first token of the next one.",
    )


class TokenizerConfig(Section):
    """How text becomes tokens."""

    tokenizer_type: Literal[
        "GPT2BPETokenizer",
        "HFTokenizer",
        "HFGPT2Tokenizer",
        "SPMTokenizer",
        "CharLevelTokenizer",
        "TiktokenTokenizer",
    ] = setting("GPT2BPETokenizer", "Kind of tokenizer.")
    vocab_file: Text | None = setting(None, "Vocabulary or tokenizer file.")
    merge_file: Text | None = setting(None, "Merges, for GPT2BPETokenizer.")


OTHER_KEYS = (internal("tokenizer", str, "The tokenizer object.", instead="set tokenizer_type and vocab_file"),)
