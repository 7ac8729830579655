"""Rules of training on preferences and rewards."""

from typing import Any

import pytest
from config.config_samples import sample

from neox.config import config_from_dict
from neox.config.requirements import check_training
from neox.errors import ConfigError

SIDES = ("pos", "neg")
PAIRS = {f"{side}_train_{kind}": ["p"] for side in SIDES for kind in ("data_paths", "label_data_paths")}
KTO = {"train_impl": "kto", "pack_impl": "unpacked"} | {
    f"{split}_{kind}data_paths": ["p"] for split in ("train", "valid", "test") for kind in ("", "label_", "reward_")
}
DPO = PAIRS | {"train_impl": "dpo", "dataset_impl": "pairwise", "pack_impl": "unpacked"}
REINFORCE = {"train_impl": "reinforce", "dataset_impl": "online"}


def flat(objective: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A whole configuration; a change to None removes a key."""
    return sample(**({"data_path": None, "tokenizer_type": "CharLevelTokenizer"} | objective | changes))


@pytest.mark.parametrize("objective", [DPO, DPO | {"train_impl": "rm"}, KTO, REINFORCE], ids=lambda o: o["train_impl"])
def test_an_objective_with_its_data(objective: dict[str, Any]) -> None:
    config = config_from_dict(flat(objective))
    check_training(config)
    assert config.notices == ()
    assert config.preference.is_on
    assert config.model.has_reward_head == (objective["train_impl"] == "rm")
    assert config_from_dict(config.to_flat(resolved=True)).preference == config.preference


@pytest.mark.parametrize(
    ("objective", "changes", "line"),
    [
        (DPO, {"dataset_impl": None} | dict.fromkeys(PAIRS), "train_impl: dpo reads dataset_impl pairwise, and it is "
         "gpt2; set it to pairwise"),
        (DPO, {"train_impl": None} | dict.fromkeys(PAIRS), "dataset_impl: 'pairwise' is for train_impl dpo or rm; set "
         "train_impl, or remove dataset_impl"),
        (DPO, {"neg_train_label_data_paths": None}, "neg_train_label_data_paths: not set, and dataset_impl pairwise "
         "reads data and labels of both sides; add it"),
        (DPO, {"neg_train_data_paths": ["p", "q"]}, "neg_train_data_paths: has 2 entries, and pos_train_data_paths has "
         "1; give as many"),
        (DPO, {"train_data_weights": [1, 2]}, "train_data_weights: has 2 entries, and pos_train_data_paths has 1"),
        (DPO, {"data_path": "p"}, "data_path: not read with dataset_impl pairwise; set pos_train_data_paths and "
         "neg_train_data_paths"),
        (DPO, {"pack_impl": "packed"}, "pack_impl: 'packed' lays several documents in a row, and train_impl dpo scores "
         "one a row; set pack_impl: unpacked"),
        (DPO, {"document_masking": True}, "document_masking: a row of train_impl dpo is one document; remove it"),
        (DPO, {"char_level_ppl": True}, "char_level_ppl: the loss of train_impl dpo is no perplexity; remove it"),
        (DPO, {"train_reward_data_paths": ["p"]}, "train_reward_data_paths: set, and train_impl is dpo; set "
         "train_impl: kto, or remove it"),
        (DPO, {"train_impl": "rm", "lora": {"rank": 2}}, "lora.rank: train_impl rm trains a new head, which lora would "
         "freeze; remove lora"),
        (DPO, {"dpo_beta": 0}, "dpo_beta: expected more than 0, got 0"),
        (KTO, {"pos_train_data_paths": ["p"]}, "pos_train_data_paths: set, and dataset_impl is gpt2; set dataset_impl: "
         "pairwise, or remove it"),
        (KTO, {"train_reward_data_paths": None}, "train_reward_data_paths: not set, and train_impl kto reads it beside "
         "train_data_paths; add it"),
        (KTO, {"test_reward_data_paths": ["p", "q"]}, "test_reward_data_paths: has 2 entries, and test_data_paths has "
         "1; give as many"),
        (KTO, {"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu: 3 is odd, and train_impl kto "
         "compares the halves of a micro-batch; make it even"),
        (REINFORCE, {"online_dataserver_ports": []}, "online_dataserver_ports: empty; name at least one server"),
        (REINFORCE, {"online_dataserver_ips": ["a", "b"], "online_dataserver_ports": [1, 2, 3]},
         "online_dataserver_ports: has 3 entries, and online_dataserver_ips has 2; give as many"),
        (REINFORCE, {"online_dataserver_ports": 70000}, "online_dataserver_ports: expected ports from 1 to 65535, got "
         "70000"),
        (REINFORCE, {"train_epochs": 1, "train_iters": None}, "train_epochs: a server of completions has no end; set "
         "train_iters"),
        (REINFORCE, {"kl_impl": "k3"}, "kl_impl: 'k3' is unknown; supported: 'abs', 'mse', 'kl' or 'full'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(objective: dict[str, Any], changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_dict(flat(objective, **changes))
    assert str(error.value).splitlines() == [line]


def test_stages_are_refused_with_what_to_do_instead() -> None:
    with pytest.raises(ConfigError, match=r"^pipe_parallel_size: 2 stages cannot run train_impl dpo; set it to 0"):
        config_from_dict(flat(DPO, pipe_parallel_size=2), world_size=2)
    assert config_from_dict(flat(DPO, pipe_parallel_size=1)).parallel.pipeline_stages == 1


@pytest.mark.parametrize(
    ("objective", "changes", "notice"),
    [
        (DPO, {"kto_beta": 0.2}, "kto_beta has no effect: train_impl is dpo"),
        (DPO, {"z_loss": 0.1}, "z_loss has no effect: train_impl is dpo"),
        (DPO, {"online_dataserver_ports": 1}, "online_dataserver_ports has no effect: dataset_impl is pairwise"),
        (REINFORCE, {"data_path": "a"},
            "data_path has no effect: completions come from the servers of dataset_impl online"),
        (DPO, {"dpo_reference_free": True, "reference_load": "x"}, "reference_load has no effect: no reference model "
         "runs with these settings"),
        (REINFORCE, {"precompute_model_name": "x"}, "precompute_model_name has no effect: no objective here reads it"),
        (REINFORCE, {"serve_model_weights": True}, "serve_model_weights has no effect here: results are the same "
         "without it"),
    ],
)  # fmt: skip
def test_a_key_that_is_not_used_is_named(objective: dict[str, Any], changes: dict[str, Any], notice: str) -> None:
    assert config_from_dict(flat(objective, **changes)).notices == (notice,)


def test_servers() -> None:
    def servers(**changes: Any) -> tuple[tuple[str, int], ...]:
        return config_from_dict(flat(REINFORCE, **changes)).comparison.servers

    assert servers() == (("localhost", 10000),)
    assert servers(online_dataserver_ports=[1, 2]) == (("localhost", 1), ("localhost", 2))
    assert servers(online_dataserver_ips=["a", "b"]) == (("a", 10000), ("b", 10000))
    assert servers(online_dataserver_ips=["a", "b"], online_dataserver_ports=[1, 2]) == (("a", 1), ("b", 2))


def test_when_a_reference_runs() -> None:
    def needs(objective: dict[str, Any], **changes: Any) -> tuple[bool, str | None]:
        config = config_from_dict(flat(objective, **changes))
        name = config.generation.precompute_model_name
        return config.preference.needs_reference(name), config.reference_files

    assert needs(DPO) == needs(KTO) == needs(REINFORCE) == (True, None)
    assert needs(DPO, precompute_model_name="x") == needs(KTO, precompute_model_name="x") == (False, "x")
    assert needs(DPO, dpo_reference_free=True, precompute_model_name="x") == (False, None)
    assert needs(REINFORCE, kl_div_beta=0) == needs(DPO, train_impl="rm") == (False, None)
