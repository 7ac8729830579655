"""Scores and texts where the tokenizer begins a text with a token of its own, against the harness' model of its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from evaluation.test_harness import requests
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from neox.checkpoint.huggingface import HuggingFaceReader
from neox.checkpoint.weights import weight_source
from neox.config import config_from_dict
from neox.data.tokenizers.fast import hf_tokenizer
from neox.evaluation.harness import require_harness
from neox.model.build import build_decoder

TURN_END = 258
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]


def tokenizer_of(folder: Path, *, adds_beginning: bool, **named: str) -> PreTrainedTokenizerFast:
    """Bytes and three special tokens, saved as transformers saves a tokenizer."""
    backend = byte_tokenizer(SPECIAL, template=f"{SPECIAL[0]} $A" if adds_beginning else "")
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of transformers; LayerNorm and this attention keep float64 throughout."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = GPTNeoXConfig(
        **sizes, vocab_size=320, max_position_embeddings=48, initializer_range=0.3, eos_token_id=TURN_END
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


def both(folder: Path, weights: Path, **tokenizer: Any) -> tuple[Any, Any]:
    """Our adapter and the harness' own, in float64, of one model and one tokenizer."""
    require_harness()
    from lm_eval.models.huggingface import HFLM

    from neox.evaluation.adapter import HarnessModel

    theirs_tokenizer = tokenizer_of(folder, **tokenizer)
    theirs = GPTNeoXForCausalLM.from_pretrained(weights, dtype=torch.float64)
    reader = HuggingFaceReader(weights)
    # A run that trains on shorter sequences is evaluated at the positions that the model has.
    config = config_from_dict(
        reader.config_keys() | {"seq_length": 16, "train_micro_batch_size_per_gpu": 1}, world_size=1
    )
    ours = build_decoder(config.model, source=weight_source(reader)).eval().double()
    own_tokenizer = hf_tokenizer(folder / "tokenizer.json")
    hf = HFLM(pretrained=theirs, tokenizer=theirs_tokenizer, device="cpu", batch_size=3)
    return HarnessModel(ours, own_tokenizer, batch_size=3), hf


PAIRS = [
    ("Once upon", " a time"),
    ("", "hi"),
    ("", " hi there"),
    ("a space goes over ", "to the other side"),
    ("0123456789" * 6, " the end of a context that is too long"),
    (f"{SPECIAL[0]}spelled out", " once"),
]
TEXTS = ["hi", "x" * 48, "longer than the positions of the model, by some", "a" * 130]


@pytest.fixture(scope="module", params=["adds", "names", "names the end only"])
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory, weights: Path) -> tuple[Any, Any, str]:
    """Tokenizers that add a beginning, that have one and do not add it, and that have none."""
    named = {"eos_token": SPECIAL[2], "pad_token": SPECIAL[1]}
    if request.param != "names the end only":
        named["bos_token"] = SPECIAL[0]
    folder = tmp_path_factory.mktemp("tokenizer")
    return *both(folder, weights, adds_beginning=request.param == "adds", **named), request.param


def test_loglikelihoods_are_those_of_the_harness_own_model(pair: tuple[Any, Any, str]) -> None:
    ours, theirs, _ = pair
    expected = theirs.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_what_begins_a_text_is_never_scored(pair: tuple[Any, Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, kind = pair
    # The harness' own model scores the beginning that its tokenizer adds, P(BOS | BOS), unless it may not add it.
    monkeypatch.setattr(theirs, "add_bos_token", False)
    texts = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, rel=1e-9)
    (spelled,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", (SPECIAL[0] + "hi",)), disable_tqdm=True)
    if kind == "adds":
        assert spelled == pytest.approx(expected[0], rel=1e-9)


def test_generated_texts_are_those_of_the_harness_own_model(pair: tuple[Any, Any, str]) -> None:
    ours, theirs, _ = pair
    # One prompt at a time: the harness' model decides by the first of a batch whether a beginning is added.
    prompts = ["Once upon", "x", f"{SPECIAL[0]}spelled out", "0123456789" * 6]
    until: list[dict[str, Any]] = [{"until": ["\n\n"], "max_gen_toks": 12}]
    for prompt in prompts:
        given = requests("generate_until", *((prompt, dict(kwargs)) for kwargs in until))
        assert ours.generate_until(given, disable_tqdm=True) == theirs.generate_until(given, disable_tqdm=True)


def test_generation_ends_at_the_end_of_a_turn(pair: tuple[Any, Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks without stop strings of their own end where the tokenizer's eos_token does, as the harness adds it."""
    ours, theirs, _ = pair
    drawn = iter([ord("a"), TURN_END, ord("b"), ord("b")])
    monkeypatch.setattr("neox.inference.generate.draw_tokens", lambda *_: torch.tensor([next(drawn)]))
    (text,) = ours.generate_until(requests("generate_until", ("x", {"max_gen_toks": 4})), disable_tqdm=True)
    assert text == ours.tokens.detokenize([ord("a")])
    assert theirs.eot_token_id == TURN_END


def test_a_context_of_spaces_alone_has_the_beginning(pair: tuple[Any, Any, str]) -> None:
    ours, _, _ = pair
    answers = ours.loglikelihood(requests("loglikelihood", ("  ", "hi"), ("", "  hi")), disable_tqdm=True)
    assert answers[0] == pytest.approx(answers[1], rel=1e-9)


def test_requests_that_were_cut_are_counted(tmp_path: Path, weights: Path) -> None:
    ours, _ = both(tmp_path, weights, adds_beginning=False, eos_token=SPECIAL[1])
    assert ours.max_length == 48
    ours.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    assert ours.cut == 1
    ours.loglikelihood_rolling(requests("loglikelihood_rolling", ("a" * 130,)), disable_tqdm=True)
    assert ours.cut == 1  # its windows leave nothing out
    given = [("x" * 44, {"max_gen_toks": 4}), ("x" * 45, {"max_gen_toks": 4}), ("x", {"max_gen_toks": 47})]
    ours.generate_until(requests("generate_until", *given), disable_tqdm=True)
    assert ours.cut == 2
