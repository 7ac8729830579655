"""What training needs beyond a configuration that merely loads."""

from neox.config.config import Config
from neox.config.data import OF_FILES
from neox.config.engine import deepspeed_dict
from neox.config.problems import Problems


def check_training(config: Config) -> None:
    """Check that nothing is missing for training; counting parameters or generating text needs none of it.

    Raises:
        ConfigError: with one line for each missing key, or for what contradicts others in deepspeed_extra_args.
    """
    problems = Problems({})
    if not config.optimizer.is_given:
        problems.add("optimizer", "training needs one; add optimizer: {type: Adam, params: {lr: 6.0e-4}}")
    if config.training.train_iters is None and config.training.train_epochs is None:
        problems.add("train_iters", "training needs a length; set train_iters or train_epochs")
    if config.comparison.dataset_impl == "gpt2" and not (config.data.data_path or config.data.train_data_paths):
        problems.add("data_path", "training needs data; set data_path, or train_, valid_ and test_data_paths")
    is_elastic = bool((config.batch.elasticity or {}).get("enabled"))
    if not (config.batch.train_batch_size or config.batch.train_micro_batch_size_per_gpu or is_elastic):
        problems.add("train_batch_size", "training needs a batch; set it or train_micro_batch_size_per_gpu")
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type in OF_FILES and tokenizer.vocab_file is None:
        if config.data.eod_mask_loss:
            problems.add("vocab_file", "eod_mask_loss needs it, for the end-of-document token; set it")
        elif config.model.padded_vocab_size is None and config.checkpoint.load is None:
            problems.add("vocab_file", f"{tokenizer.tokenizer_type} needs it; set it, or padded_vocab_size")
    _check_load(config, problems)
    problems.raise_any()
    if config.parallel.world_size is not None:
        deepspeed_dict(config)


def _check_load(config: Config, problems: Problems) -> None:
    """Refuse what says how to load where nothing is loaded: the run would start from fresh weights."""
    for key in ("finetune", "iteration"):
        if config.checkpoint.load is None and getattr(config.checkpoint, key):
            problems.add(key, f"says what to load, and load is not set; set load, or remove {key}")
