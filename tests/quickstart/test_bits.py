import math

import numpy as np
import pytest
import torch

from neox.config import config_from_dict
from neox.model.build import build_decoder, fresh_weights
from neox.model.layers import Decoder
from neox.quickstart.bits import HeldOutLoss, held_out_loss, windows

EOD = 0
LENGTH = 16


def make_model() -> Decoder:
    config = config_from_dict(
        {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "seq_length": LENGTH,
            "max_position_embeddings": LENGTH,
            "pos_emb": "rotary",
            "rotary_pct": 0.25,
            "padded_vocab_size": 64,
            "train_micro_batch_size_per_gpu": 1,
            "init_method_std": 0.5,  # far from uniform, so that context matters
            "optimizer": {"type": "Adam", "params": {"lr": 1e-3}},
            "train_iters": 1,
        }
    )
    return build_decoder(config.model, source=fresh_weights(config)).eval()


def make_documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [np.append(generator.integers(1, 64, size=length - 1), EOD).astype(np.uint16) for length in lengths]


@pytest.mark.parametrize("labels", [1, 5, LENGTH - 1, LENGTH, LENGTH + 1, 40, 41, 64])
@pytest.mark.parametrize("stride", [1, 4, 7, LENGTH])
def test_windows_count_each_token_once_in_order(labels: int, stride: int) -> None:
    document = np.arange(1, labels + 1)
    counted = []
    for number, window in enumerate(windows(document, eod=EOD, length=LENGTH, stride=stride)):
        assert len(window.rows) == min(LENGTH, labels) + 1
        assert number == 0 or window.new <= stride
        counted += window.rows[-window.new :].tolist()
    assert counted == document.tolist()


@pytest.mark.parametrize("stride", [3, LENGTH])
@torch.no_grad()
def test_loss_is_that_of_each_token_given_its_window(stride: int) -> None:
    model, documents = make_model(), make_documents(3, LENGTH, 50, 100)
    loss = held_out_loss(model, iter(documents), eod=EOD, text_bytes=1000, stride=stride)
    nats = 0.0
    for document in documents:
        rows = torch.from_numpy(np.append(EOD, document).astype(np.int64))
        window = list(windows(document, eod=EOD, length=LENGTH, stride=stride))
        label = 1
        for end in np.cumsum([w.new for w in window]):
            logits = model(rows[None, max(0, end - LENGTH) : end])[0].double().log_softmax(-1)
            for position in range(label, end + 1):
                nats -= float(logits[position - 1 - max(0, end - LENGTH), rows[position]])
            label = end + 1
    assert loss.tokens == 3 + LENGTH + 50 + 100
    assert loss.nats == pytest.approx(nats, rel=1e-6)


def test_a_uniform_model_needs_the_logarithm_of_the_vocabulary() -> None:
    model = make_model()
    with torch.no_grad():
        model.head.final_linear.weight.zero_()
    loss = held_out_loss(model, make_documents(30, 71), eod=EOD, text_bytes=303, stride=8)
    assert loss.bits_per_byte == pytest.approx(6 * 101 / 303, rel=1e-6)


def test_bits_per_byte() -> None:
    assert HeldOutLoss(nats=math.log(2.0) * 12, tokens=4, text_bytes=8).bits_per_byte == pytest.approx(1.5)
