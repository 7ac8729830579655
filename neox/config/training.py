"""The training loop and its checkpoints."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from neox.config.keys import (
    Int,
    Ints,
    Lower,
    Section,
    Text,
    dead,
    internal,
    no_effect,
    number,
    setting,
    whole_number,
)

Amount = Annotated[int | float, BeforeValidator(number), BeforeValidator(whole_number)]


class TrainingConfig(Section):
    """How long to train, and what happens on the way."""

    train_iters: Int | None = setting(None, "Optimizer steps of the run.", ge=0, rule="Not together with train_epochs.")
    train_epochs: Int | None = setting(
        None,
        "Passes over the data, instead of train_iters.",
        gt=0,
        rule="train_iters is the batches of the data times the epochs; needs pack_impl packed and equal weights.",
    )
    eval_interval: Int = setting(1000, "Iterations between evaluations.", gt=0)
    eval_iters: Int = setting(100, "Batches of one evaluation.", ge=0, rule="0 turns do_valid and do_test off.")
    exit_interval: Int | None = setting(
        None, "Stop at the next multiple of this iteration.", gt=0, rule="A checkpoint is saved first."
    )
    seed: Int = setting(1234, "Seed of weights, dropout and data order.", gt=0, lt=2**32)
    checkpoint_activations: bool = setting(False, "Recompute activations in the backward pass.")
    checkpoint_in_cpu: bool = setting(False, "Keep the inputs of recomputed segments in the host's memory.")
    checkpoint_num_layers: Int = setting(
        1, "Layers of one recomputed segment.", gt=0, rule="Used with checkpoint_activations."
    )
    do_train: bool = setting(True, "Train at all.")
    do_valid: bool = setting(True, "Evaluate on validation data; absent: when eval_iters is above 0.")
    do_test: bool = setting(True, "Evaluate on test data at the end; absent: when eval_iters is above 0.")
    curriculum_learning: dict[str, Any] | None = setting(
        None,
        "Growing length of training sequences: enabled, curriculum_type seqlen, min_difficulty and max_difficulty in "
        "tokens, schedule_type fixed_linear, fixed_root or fixed_discrete, and its schedule_config.",
        rule="Each sample is cut to the length of the step: as many samples are consumed as without it.",
    )
    char_level_ppl: bool = setting(False, "Report perplexity per character too.")
    distributed_backend: Annotated[Literal["nccl", "gloo"], Lower] = setting(
        "nccl", "Communication library; without CUDA it is always gloo."
    )


class CheckpointConfig(Section):
    """What is saved when, and what is loaded."""

    save: Text | None = setting(
        None, "Folder that checkpoints are written to.", rule="Needs checkpoint_factor or extra_save_iters."
    )
    load: Text | None = setting(
        None,
        "Folder that a checkpoint is read from: a run to go on with, or weights (Hugging Face's too) to start from.",
        rule="Keys of the model that are absent are the checkpoint's; those given must agree with it.",
    )
    iteration: Int | None = setting(None, "Iteration to load; absent: the latest.", ge=0)
    checkpoint_scale: Annotated[Literal["linear", "log"], Lower] = setting(
        "linear", "Save every checkpoint_factor iterations, or at its powers."
    )
    checkpoint_factor: Amount | None = setting(
        None,
        "Iterations between checkpoints, or the ratio of two.",
        gt=0,
        rule="A whole number when checkpoint_scale is linear, above 1 when log.",
    )
    extra_save_iters: Ints = setting((), "Further iterations to save; 0 is before the first step.")
    keep_last_n_checkpoints: Int | None = setting(None, "Delete all but the last n that the run has written.", gt=0)
    no_save_optim: bool = setting(False, "Do not save the optimizer.")
    no_save_rng: bool = setting(False, "Do not save the state of random numbers.")
    no_load_optim: bool = setting(False, "Do not load the optimizer.")
    no_load_rng: bool = setting(False, "Do not load the state of random numbers.")
    checkpoint_validation_with_forward_pass: bool = setting(
        False,
        "Save the losses of a few fixed sequences with every checkpoint, and compare them when a run is taken up.",
        rule="Agreement is to 1e-4 in fp32, 5e-3 in fp16, 2e-2 in bfloat16; finetune does not compare.",
    )
    load_fallback: bool = setting(
        False,
        "Where the checkpoint is damaged, or latest is lost, load the newest whole one instead of stopping.",
        rule="Needs load.",
    )
    async_save: bool = setting(
        False,
        "Write checkpoints in the background while training goes on.",
        rule="Each rank holds a copy of what it writes in the host's memory; a save waits for the one before it.",
    )
    save_hf: bool = setting(
        False, "Make every checkpoint a Hugging Face folder as well, in its subfolder hf, with its logits checked."
    )
    s3_path: Text | None = setting(
        None,
        "S3-compatible address, s3://bucket/prefix, that every host uploads its part of a checkpoint to.",
        rule="Needs save. AWS_ENDPOINT_URL names the server of a store that is not Amazon's.",
    )
    s3_chunk_size: Int = setting(104857600, "Bytes of an uploaded part.", ge=5 * 2**20, le=5 * 2**30)
    finetune: bool = setting(
        False,
        "Load the weights only, and start at iteration 0.",
        rule="Turns off what no_load_optim and no_load_rng turn off, and the saved schedule.",
    )


OTHER_KEYS = (
    no_effect("partition_activations", bool, False, "Share recomputed inputs among tensor ranks."),
    no_effect("contiguous_checkpointing", bool, False, "Recompute from contiguous buffers."),
    no_effect("synchronize_each_layer", bool, False, "Synchronise the device around segments."),
    dead("deepspeed_activation_checkpointing", bool, True, "Recompute by DeepSpeed."),
    dead("short_seq_prob", float, 0.1, "A setting of BERT."),
    dead("adlr_autoresume", bool, False, "A hook of one cluster."),
    dead("adlr_autoresume_interval", int, 1000, "A hook of one cluster."),
    internal("adlr_autoresume_object", str, "A hook of one cluster.", instead="leave it out"),
    internal("config_files", dict, "Texts of the files.", instead="leave it out: checkpoints hold them anyway"),
    no_effect("profile_backward", bool, False, "Time the recomputed backward pass; profile: true shows it."),
)
