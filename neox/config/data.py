"""The data and the tokenizer."""

from typing import Literal

from neox.config.keys import Float, Floats, Int, Section, Strings, internal, not_yet, setting


class DataConfig(Section):
    """Which indexed files are read, and how documents become samples."""

    data_path: str | None = setting(None, "Prefix of one indexed dataset, cut up by split.")
    train_data_paths: Strings | None = setting(None, "Prefixes of the training datasets.")
    valid_data_paths: Strings | None = setting(None, "Prefixes of the validation datasets.")
    test_data_paths: Strings | None = setting(None, "Prefixes of the test datasets.")
    train_label_data_paths: Strings | None = setting(None, "Prefixes of the training labels.")
    valid_label_data_paths: Strings | None = setting(None, "Prefixes of the validation labels.")
    test_label_data_paths: Strings | None = setting(None, "Prefixes of the test labels.")
    train_data_weights: Floats | None = setting(None, "Weights of the training datasets; absent: equal.")
    valid_data_weights: Floats | None = setting(None, "Weights of the validation datasets; absent: equal.")
    test_data_weights: Floats | None = setting(None, "Weights of the test datasets; absent: equal.")
    weight_by_num_documents: bool = setting(False, "Take the weights from the numbers of documents.")
    weighted_sampler_alpha: Float = setting(1.0, "Exponent of weight_by_num_documents.", ge=0)
    data_impl: Literal["infer", "mmap", "cached"] = setting("infer", "Format of the indexed files.")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = setting(
        "packed", "How documents are laid into samples."
    )
    allow_chopped: bool = setting(True, "Allow documents cut at a sample's end; packed always cuts.")
    mmap_warmup: bool = setting(False, "Read each data file whole once, to fill the page cache.")
    split: str = setting("969, 30, 1", "Proportions of training, validation and test in data_path.")
    num_workers: Int = setting(2, "Loader processes of each process.", ge=0)
    use_shared_fs: bool = setting(True, "Sample maps are built once for all hosts, not once a host.")
    eod_mask_loss: bool = setting(False, "Take no loss where the input is the end of a document.")


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
    vocab_file: str | None = setting(None, "Vocabulary or tokenizer file.")
    merge_file: str | None = setting(None, "Merges, for GPT2BPETokenizer.")


_PAIRS = tuple(
    not_yet(f"{side}_{split}_{kind}", list, None, "Datasets of preferred and rejected completions.")
    for side in ("pos", "neg")
    for split in ("train", "valid", "test")
    for kind in ("data_paths", "label_data_paths")
)

OTHER_KEYS = (
    *_PAIRS,
    not_yet("train_reward_data_paths", list, None, "Rewards of training documents."),
    not_yet("valid_reward_data_paths", list, None, "Rewards of validation documents."),
    not_yet("test_reward_data_paths", list, None, "Rewards of test documents."),
    not_yet("dataset_impl", Literal["gpt2", "pairwise", "online"], "gpt2", "Kind of dataset."),
    not_yet("online_dataserver_ips", str | list, "localhost", "Hosts that serve samples."),
    not_yet("online_dataserver_ports", int | list, 10000, "Ports that serve samples."),
    internal("tokenizer", str, "The tokenizer object.", instead="set tokenizer_type and vocab_file"),
)
