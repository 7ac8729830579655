"""LoRA: nothing at the start, the gradients of W + (alpha / rank) B A, and the same function once merged."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from neox.config import Config, config_from_dict, load_config
from neox.config.lora import LINEARS
from neox.errors import ConfigError
from neox.model.build import build_decoder, fresh_weights, layer_builder
from neox.model.layers import Decoder, layer_list
from neox.model.lora import LowRankUpdate, initial_factor, is_factor, merge_factors
from neox.model.loss import Targets, token_losses
from neox.parallel.mesh import Mesh

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "seq_length": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "padded_vocab_size": 61,
    "train_micro_batch_size_per_gpu": 2,
}
LORA = {"rank": 3, "alpha": 12.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "neox": {},
    "tied_sequential": {"no_weight_tying": False, "gpt_j_residual": False},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "num_kv_heads": 2,
        "gpt_j_residual": False,
        "use_bias_in_attn_linear": False,
        "use_bias_in_mlp": False,
    },
}


def configured(**changes: Any) -> Config:
    return config_from_dict(MODEL | {"lora": LORA} | changes)


def adapted(config: Config) -> Decoder:
    """The model as a run builds it."""
    build = layer_builder(config, Mesh(), fresh_weights(config))
    return Decoder(config.model, layers=[build(spec) for spec in layer_list(config.model)])


def base(config: Config) -> Decoder:
    return build_decoder(config.model, source=fresh_weights(config))


def with_random_factors(model: Decoder) -> Decoder:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_factor(name):
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


def merged_weights(model: Decoder, scale: float) -> dict[str, torch.Tensor]:
    """Every weight of the base model, as a function of the factors."""
    own = dict(model.named_parameters())
    merged = {}
    for name, weight in own.items():
        module = name.rpartition(".")[0]
        if not is_factor(name):
            adapts = name.endswith("weight") and f"{module}.lora_A" in own
            merged[name] = weight + scale * own[f"{module}.lora_B"] @ own[f"{module}.lora_A"] if adapts else weight
    return merged


def tokens(config: Config, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (2, config.model.seq_length), generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
def test_starts_as_the_base_model(family: str) -> None:
    config = configured(**FAMILIES[family])
    ids = tokens(config)
    assert torch.equal(adapted(config)(ids), base(config)(ids))
    assert not torch.equal(with_random_factors(adapted(config))(ids), base(config)(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_merged_matrices(family: str) -> None:
    config = configured(**FAMILIES[family])
    ids, labels = tokens(config), tokens(config, seed=1)
    model = with_random_factors(adapted(config)).double()
    loss = model(ids, Targets(labels, torch.full(labels.shape, 1 / labels.numel())))
    loss.backward()

    weights = merged_weights(model, scale=4.0)
    reference = functional_call(base(config).double(), weights, (ids,))
    expected_loss = token_losses(reference, labels).mean()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(expected_loss, list(factors.values()))
    # The sum of the losses is fp32: every addition rounds by at most half a unit of the last place.
    assert float(loss.detach()) == pytest.approx(float(expected_loss.detach()), rel=labels.numel() * 2**-24)
    for (name, parameter), gradient in zip(factors.items(), expected, strict=True):
        assert parameter.grad is not None
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_matrices_compute_the_same(family: str) -> None:
    config = configured(**FAMILIES[family])
    ids = tokens(config)
    model = with_random_factors(adapted(config)).double()
    own = dict(model.named_parameters())
    plain = base(config).double()
    for name, parameter in plain.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and f"{module}.lora_A" in own:
            a, b = own[f"{module}.lora_A"], own[f"{module}.lora_B"]
            merged = merge_factors(own[name].data, a.data, b.data, scale=config.lora.scale)  # in fp32
            parameter.data = merged.double()
    torch.testing.assert_close(plain(ids), model(ids), rtol=1e-6, atol=1e-6)


def test_only_factors_are_trained() -> None:
    config = configured()
    trained = {name: p for name, p in adapted(config).named_parameters() if p.requires_grad}
    assert set(trained) == {
        f"layers.{layer}.{name}.{factor}" for layer in (2, 3) for name in LINEARS for factor in ("lora_A", "lora_B")
    }
    inputs_and_outputs = (32 + 96) + (32 + 32) + (32 + 128) + (128 + 32)
    assert sum(p.numel() for p in trained.values()) == 2 * 3 * inputs_and_outputs
    assert trained["layers.2.mlp.linear2.lora_A"].shape == (3, 128)
    assert trained["layers.2.mlp.linear2.lora_B"].shape == (32, 3)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["query_key_value"], LINEARS[:1]),
        (["linear2", "dense"], ("attention.dense", "mlp.linear2")),
        (["attention"], LINEARS[:2]),
        (["mlp", "attention.dense"], LINEARS[1:]),
        (None, LINEARS),
    ],
)
def test_targets_choose_matrices(targets: Any, expected: tuple[str, ...]) -> None:
    config = configured(lora=LORA | {"targets": targets} if targets else LORA)
    assert config.lora.targets == expected
    trained = {name for name, p in adapted(config).named_parameters() if p.requires_grad}
    assert {name.split(".", 2)[2].rpartition(".")[0] for name in trained} == set(expected)
    for keys in (config.to_flat()["lora"], config.to_flat(resolved=True)["lora"], config.lora.model_dump()):
        assert configured(lora=json.loads(json.dumps(keys))).lora == config.lora


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "targets": ["query_key_valu"]}, "lora.targets.*query_key_valu.*did you mean 'query_key_value'"),
        ({"rank": 4, "targets": ["wq"]}, "lora.targets.*'wq'.*query_key_value, dense, linear1, linear2"),
        ({"rank": 4, "targets": []}, "lora.targets.*nothing would be trained"),
        ({"rank": 4, "targets": "attention"}, "lora.targets: expected a list"),
        ({"alpha": 4.0}, "lora.rank.*alpha.*rank: 8"),
        ({"rank": -1}, "lora.rank.*at least 0.*-1"),
        ({"rank": 64}, "lora.rank.*64.*hidden_size 32"),
        ({"rank": 4, "alpha": 0}, "lora.alpha.*more than 0"),
        ({"rank": 4, "dropout": 1.0}, "lora.dropout.*less than 1"),
        ({"rank": 4, "alfa": 1.0}, "lora.alfa.*did you mean 'alpha'"),
        ({"rank": "many"}, "lora.rank.*an integer"),
        (8, "lora.*expected a mapping"),
    ],
)
def test_mistakes_are_one_line(lora: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(lora=lora)
    assert re.fullmatch(message + ".*", str(caught.value))


def test_the_ready_file_lies_over_a_model() -> None:
    files = [CONFIGS / name for name in ("pythia/160M.yml", "local_setup.yml", "lora.yml")]
    config = load_config(files, overrides=["load=pythia-160m"])
    assert config.checkpoint.finetune
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (8, 16.0, LINEARS)


def test_absent_means_off() -> None:
    config = config_from_dict(MODEL)
    assert not config.lora.is_on
    assert all(p.requires_grad for p in adapted(config).parameters())
    assert not any(map(is_factor, dict(adapted(config).named_parameters())))


def test_factors_depend_on_seed_and_name_alone() -> None:
    shape = torch.Size((8, 1024))
    a = initial_factor("layers.2.attention.dense.lora_A", shape, seed=1)
    assert torch.equal(a, initial_factor("layers.2.attention.dense.lora_A", shape, seed=1))
    assert not torch.equal(a, initial_factor("layers.3.attention.dense.lora_A", shape, seed=1))
    assert not torch.equal(a, initial_factor("layers.2.attention.dense.lora_A", shape, seed=2))
    # Uniform on +-1/sqrt(in): that is the bound, and its variance is a third of the bound's square.
    assert float(a.abs().max()) == pytest.approx(1 / 32, rel=1e-3)
    assert float(a.var()) == pytest.approx(1 / 1024 / 3, rel=0.05)
    assert not initial_factor("layers.2.attention.dense.lora_B", shape, seed=1).any()


def test_dropout_falls_on_the_update_alone() -> None:
    config = configured(lora=LORA | {"dropout": 0.5})
    layer = torch.nn.Linear(64, 16)
    layer.lora_A, layer.lora_B = torch.nn.Parameter(torch.randn(3, 64)), torch.nn.Parameter(torch.randn(16, 3))
    plain = torch.nn.Linear(64, 16)
    plain.load_state_dict({name: layer.state_dict()[name] for name in ("weight", "bias")})
    layer.register_forward_hook(LowRankUpdate(config.lora, None, Mesh(), sequence_parallel=False))
    x = torch.randn(4096, 64)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    torch.manual_seed(3)
    update = (x * kept) @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), plain(x) + 4.0 * update)
    assert 0.49 < float((kept > 0).float().mean()) < 0.51
    torch.testing.assert_close(layer.eval()(x), plain(x) + 4.0 * x @ layer.lora_A.T @ layer.lora_B.T)
