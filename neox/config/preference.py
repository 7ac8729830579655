"""Training on preferences and rewards: the objective, and the data it compares."""

from typing import Annotated, Literal

from neox.config.keys import Float, Int, Ints, Key, Lower, Section, Strings, Text, setting


class PreferenceConfig(Section):
    """What is minimised: the next token's loss, or an objective of preferences or rewards."""

    train_impl: Annotated[Literal["normal", "dpo", "rm", "kto", "reinforce"], Lower] = setting(
        "normal",
        "Objective: the next token, or direct preference optimisation, a reward model, KTO, REINFORCE.",
        rule="All but normal run without pipeline stages. dpo and rm need dataset_impl pairwise, reinforce online.",
    )
    dpo_beta: Float = setting(0.1, "Strength of DPO's pull towards the reference.", gt=0)
    dpo_fp32: bool = setting(
        True, "Keep DPO's log-probabilities in fp32; false rounds those of tokens to the model's precision."
    )
    dpo_reference_free: bool = setting(False, "DPO against a uniform reference: none is loaded.")
    kto_beta: Float = setting(0.1, "Strength of KTO's pull towards the reference.", gt=0)
    kto_fp32: bool = setting(
        True, "Keep KTO's log-probabilities in fp32; false rounds those of tokens to the model's precision."
    )
    kto_desirable_weight: Float = setting(1.0, "KTO's weight of documents with a reward above 0.", ge=0)
    kto_undesirable_weight: Float = setting(1.0, "KTO's weight of documents with a reward below 0.", ge=0)
    z_loss: Float = setting(0.0, "Weight of a reward model's penalty on the square of its rewards.", ge=0)
    fp32_reinforce: bool = setting(
        True, "Keep REINFORCE's log-probabilities in fp32; false rounds those of tokens to the model's precision."
    )
    kl_impl: Annotated[Literal["abs", "mse", "kl", "full"], Lower] = setting(
        "mse",
        "REINFORCE's estimate of a token's divergence from the reference, d being the difference of log-probabilities: "
        "|d|, d^2 / 2, d, or the true divergence over the vocabulary.",
        rule="full holds the logits of a whole micro-batch, of the model and of the reference. d has no gradient in "
        "expectation: it is measured and does not hold the model back.",
    )
    kl_div_beta: Float = setting(
        0.1, "Weight of the divergence in REINFORCE.", ge=0, rule="At 0 no reference is loaded."
    )
    reinforce_leave_one_out: bool = setting(
        False,
        "Baseline of a completion: the mean reward of the others of its prompt; else that of the last 100 prompts.",
    )
    reference_load: Text | None = setting(
        None,
        "Checkpoint of the frozen reference of dpo, kto and reinforce; absent: the weights the run began with.",
        rule="Kept in checkpoints, so that a resumed run has the same reference.",
    )

    @property
    def is_on(self) -> bool:
        """Whether the objective is another than the next token's."""
        return self.train_impl != "normal"

    @property
    def compares_pairs(self) -> bool:
        """Whether a sample is a preferred and a rejected document."""
        return self.train_impl in ("dpo", "rm")

    def needs_reference(self, precomputed: str | None) -> bool:
        """Whether a frozen model runs beside the trained one, given `precompute_model_name`."""
        return {
            "dpo": not self.dpo_reference_free and precomputed is None,
            "kto": precomputed is None,
            "reinforce": self.kl_div_beta > 0,
        }.get(self.train_impl, False)


def _paths(side: str, split: str) -> Strings | None:
    kind = "preferred" if side == "pos" else "rejected"
    rule = "With dataset_impl pairwise; document by document those of neg_, and as many labels."
    what = {"train": "training", "valid": "validation", "test": "test"}[split]
    return setting(None, f"Prefixes of the {kind} {what} documents.", rule=rule if side == "pos" else "See pos_.")


def _label_paths(side: str, split: str) -> Strings | None:
    return setting(
        None,
        f"Prefixes of the labels of {side}_{split}_data_paths: the token, or -100 where it is not scored.",
        rule=f"As many as {side}_{split}_data_paths.",
    )


def _reward_paths(split: str) -> Strings | None:
    return setting(
        None,
        f"Prefixes of the rewards of {split}_data_paths, above 0 where a document is desirable and below where not.",
        rule=f"With train_impl kto; as many as {split}_data_paths.",
    )


class ComparisonConfig(Section):
    """What preferences and rewards are read from."""

    dataset_impl: Annotated[Literal["gpt2", "pairwise", "online"], Lower] = setting(
        "gpt2", "Documents, pairs of documents, or completions from a server.", rule="See train_impl."
    )
    pos_train_data_paths: Strings | None = _paths("pos", "train")
    neg_train_data_paths: Strings | None = _paths("neg", "train")
    pos_train_label_data_paths: Strings | None = _label_paths("pos", "train")
    neg_train_label_data_paths: Strings | None = _label_paths("neg", "train")
    pos_valid_data_paths: Strings | None = _paths("pos", "valid")
    neg_valid_data_paths: Strings | None = _paths("neg", "valid")
    pos_valid_label_data_paths: Strings | None = _label_paths("pos", "valid")
    neg_valid_label_data_paths: Strings | None = _label_paths("neg", "valid")
    pos_test_data_paths: Strings | None = _paths("pos", "test")
    neg_test_data_paths: Strings | None = _paths("neg", "test")
    pos_test_label_data_paths: Strings | None = _label_paths("pos", "test")
    neg_test_label_data_paths: Strings | None = _label_paths("neg", "test")
    train_reward_data_paths: Strings | None = _reward_paths("train")
    valid_reward_data_paths: Strings | None = _reward_paths("valid")
    test_reward_data_paths: Strings | None = _reward_paths("test")
    online_dataserver_ips: Text | Strings = setting(
        "localhost",
        "Hosts of the servers of completions.",
        rule="With dataset_impl online; data-parallel rank r asks server r, from the first again after the last.",
    )
    online_dataserver_ports: Int | Ints = setting(
        10000, "Ports of the servers of completions.", rule="One for all hosts, or as many as online_dataserver_ips."
    )

    @property
    def is_pairwise(self) -> bool:
        """Whether a sample is a preferred and a rejected document."""
        return self.dataset_impl == "pairwise"

    def side(self, side: str, split: str) -> tuple[str, ...]:
        """Prefixes of one side of a split's pairs; empty where there are none."""
        return getattr(self, f"{side}_{split}_data_paths") or ()

    @property
    def servers(self) -> tuple[tuple[str, int], ...]:
        """Host and port of each server of completions."""
        hosts, ports = self.online_dataserver_ips, self.online_dataserver_ports
        hosts = (hosts,) if isinstance(hosts, str) else hosts
        ports = (ports,) if isinstance(ports, int) else ports
        count = max(len(hosts), len(ports))
        return tuple(zip(hosts * (count // len(hosts)), ports * (count // len(ports)), strict=True))


OTHER_KEYS: tuple[Key, ...] = ()
