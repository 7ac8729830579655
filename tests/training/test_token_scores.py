"""What an objective asks of a model, and the reference's answer beside it."""

from pathlib import Path

import pytest
import torch
from config.config_samples import sample

from neox.checkpoint.huggingface.detect import family_of
from neox.config import config_from_dict, load_config
from neox.errors import CheckpointError
from neox.model.build import SINGLE, build_decoder, fresh_weights
from neox.model.loss import Targets
from neox.training.batches import ModelInputs
from neox.training.objectives.scores import Reference, token_scores

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def inputs() -> ModelInputs:
    generator = torch.Generator().manual_seed(2)
    tokens, labels = torch.randint(0, 61, (2, 3, 9), generator=generator)
    weights = torch.randint(0, 2, (3, 9), generator=generator) * 0.25
    return ModelInputs(tokens, Targets(labels, weights), None, {"reference": torch.full((3, 9), -2.0)})


def test_scores_count_where_labels_do(inputs: ModelInputs) -> None:
    config = config_from_dict(sample(padded_vocab_size=61))
    model = build_decoder(config.model, source=fresh_weights(config)).eval()
    everything = torch.log_softmax(model(inputs.tokens_BS), dim=-1)
    wanted = everything.gather(2, inputs.targets.labels_BS[..., None]).squeeze(2) * (inputs.targets.weights_BS > 0)
    exact = token_scores(model, inputs, in_fp32=True, dtype=torch.bfloat16)
    torch.testing.assert_close(exact, wanted, rtol=1e-5, atol=1e-6)
    rounded = token_scores(model, inputs, in_fp32=False, dtype=torch.bfloat16)
    assert torch.equal(rounded, exact.to(torch.bfloat16).float())
    assert not torch.equal(rounded, exact)


def test_scores_on_disk_take_the_place_of_a_model(inputs: ModelInputs) -> None:
    found = Reference(None).token_scores(inputs, in_fp32=True, dtype=torch.float32)
    assert torch.equal(found, -2.0 * (inputs.targets.weights_BS > 0))


def test_a_reference_is_frozen_and_without_dropout(inputs: ModelInputs) -> None:
    config = config_from_dict(sample(padded_vocab_size=61, hidden_dropout=0.5, attention_dropout=0.5, lora={"rank": 2}))
    reference = Reference.build(config, SINGLE, fresh_weights(config))
    first, second = (reference.token_scores(inputs, in_fp32=True, dtype=torch.float32) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert reference.model is not None
    assert not [p for p in reference.model.parameters() if p.requires_grad]
    assert not [name for name, _ in reference.model.named_parameters() if "lora" in name]


def test_a_reward_model_is_not_exported() -> None:
    config = config_from_dict(sample(padded_vocab_size=61)).model.model_copy(update={"has_reward_head": True})
    with pytest.raises(CheckpointError, match="a reward model cannot be exported to Hugging Face"):
        family_of(config)


def test_the_ready_file_lies_over_a_model() -> None:
    files = [CONFIGS / name for name in ("pythia/160M.yml", "local_setup.yml")]
    config = load_config(files, override_files=[CONFIGS / "dpo.yml"], overrides=["load=sft"])
    assert config.preference.compares_pairs
    assert config.checkpoint.finetune
    assert not [notice for notice in config.notices if "no effect" in notice]
