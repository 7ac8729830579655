"""Documents of a packed row do not see each other: the row is worth its documents alone, in every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training.growth import CURRICULUM, END, LENGTHS, RAMP, SIZES, by_hand, packed_row, run, settings
from training.layouts import MODEL, SGD, TRAINING, VOCABULARY

from neox.config import config_from_dict
from neox.data import IndexedDatasetWriter, build_datasets
from neox.errors import UserError
from neox.model.attention import Attention
from neox.model.build import build_decoder, fresh_weights
from neox.model.layers import Decoder
from neox.model.loss import Targets
from neox.model.positions import RotaryEmbedding
from neox.parallel.mesh import build_mesh
from neox.training.batches import document_context, micro_batch
from neox.training.preflight import prepare
from neox.training.run import batch_maker, build_engine, train_loader

MODELS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"pos_emb": "learned"},
    "alibi": {"pos_emb": "alibi"},
    "sinusoidal": {"pos_emb": "sinusoidal"},
    "none": {"pos_emb": "none"},
    "window": {"sliding_window_width": 4},
    "alibi_window": {"pos_emb": "alibi", "sliding_window_width": 4},
    "gqa": {"num_kv_heads": 2, "gpt_j_residual": False},
    "compiled": {},
}
DOCUMENTS = (7, 1, 12, 12)
"""Tokens of the documents of a row, the end of each included but for the last, which the row cuts."""


def decoder(name: str) -> Decoder:
    config = config_from_dict(MODEL | {"init_method_std": 0.05, "train_micro_batch_size_per_gpu": 1} | MODELS[name])
    model = build_decoder(config.model, source=fresh_weights(config))
    if name == "compiled":
        for block in model.blocks:
            block.compile(backend="eager", fullgraph=True)
    return model


def row_of_documents(*, seed: int = 0) -> torch.Tensor:
    """[1, S] of random tokens, no two the same, each document but the last with its end."""
    generator = torch.Generator().manual_seed(seed)
    tokens_S = 1 + torch.randperm(VOCABULARY - 1, generator=generator)[: sum(DOCUMENTS)]
    tokens_S[np.cumsum(DOCUMENTS)[:-1] - 1] = END
    return tokens_S[None]


def test_documents_are_numbered_and_positions_begin_again() -> None:
    ends_BS = torch.randint(0, 4, (16, 40), generator=torch.Generator().manual_seed(1)) == 0
    context = document_context(ends_BS.cumsum(1) - ends_BS.long())
    for ends, documents, positions in zip(ends_BS, context.documents_BS, context.positions_BS, strict=True):
        document = position = 0
        for i, is_end in enumerate(ends):
            assert (int(documents[i]), int(positions[i])) == (document, position)
            position += 1
            if is_end:
                document, position = document + 1, 0


@pytest.mark.parametrize("name", MODELS)
def test_packed_row_is_its_documents_alone(name: str) -> None:
    model, tokens_BS = decoder(name).double(), row_of_documents()
    packed = model(tokens_BS, None, packed_row(tokens_BS))
    alone = [model(document) for document in tokens_BS.split(DOCUMENTS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-12)
    assert (packed - model(tokens_BS)).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_other_documents_have_no_influence_and_get_no_gradient(name: str) -> None:
    model, tokens_BS = decoder(name), row_of_documents()
    start, end = sum(DOCUMENTS[:2]), sum(DOCUMENTS[:3])
    changed_BS = tokens_BS.clone()
    changed_BS[:, start : end - 1] = row_of_documents(seed=5)[:, start : end - 1]
    before, after = (model(tokens, None, packed_row(tokens)).detach() for tokens in (tokens_BS, changed_BS))
    others = [*range(start), *range(end, sum(DOCUMENTS))]
    assert (before[:, others] - after[:, others]).abs().max() == 0.0
    assert (before[:, start:end] - after[:, start:end]).abs().max() > 1e-3

    weights_BS = torch.zeros(tokens_BS.shape)
    weights_BS[:, start:end] = 1.0
    model(tokens_BS, Targets(tokens_BS.roll(-1), weights_BS), packed_row(tokens_BS)).backward()
    gradient = model.embedding.word_embeddings.weight.grad
    assert gradient is not None
    rows = tokens_BS[0]
    assert gradient[rows[[i for i in others if rows[i] != END]]].abs().max() == 0.0
    assert gradient[rows[start:end]].abs().sum(1).min() > 0.0


def test_gradients_are_the_sum_of_the_documents_alone() -> None:
    model, tokens_BS = decoder("rotary").double(), row_of_documents()
    labels_BS, weights_BS = tokens_BS.roll(-1), torch.linspace(0.5, 1.5, tokens_BS.shape[1])[None]
    model(tokens_BS, Targets(labels_BS, weights_BS), packed_row(tokens_BS)).backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    pieces = (x.split(DOCUMENTS, dim=1) for x in (tokens_BS, labels_BS, weights_BS))
    for tokens, labels, weights in zip(*pieces, strict=True):
        model(tokens, Targets(labels, weights)).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-5, atol=1e-5, msg=name)


GROWING = RAMP | CURRICULUM
TIED_LEARNED = {"no_weight_tying": False, "pos_emb": "learned"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "recompute": (1, {"checkpoint_activations": True}),
    "tp2": (2, {"model_parallel_size": 2}),
    "tp2_sp": (2, {"model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipe_parallel_size": 2}),
    "pp2_tied_learned_recompute": (2, {"pipe_parallel_size": 2, "checkpoint_activations": True} | TIED_LEARNED),
    "zero1": (2, {"zero_optimization": {"stage": 1}}),
    "zero2": (2, {"zero_optimization": {"stage": 2}}),
    "zero3_recompute": (2, {"zero_optimization": {"stage": 3}, "checkpoint_activations": True}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_plain_torch_of_single_documents(documents: str, layout: str) -> None:
    """Documents apart, lengths and batches growing: all at once, against each document run alone by hand."""
    world_size, changes = LAYOUTS[layout]
    flat = settings(documents, **GROWING | changes)
    found = run_ranks(run, world_size, flat, world_size)
    model = TIED_LEARNED if "learned" in layout else {}
    expected = by_hand(settings(documents, **model), SIZES, LENGTHS)
    assert expected[0] - expected[-1] > 0.2
    for figures in found:
        assert (figures.sizes, figures.lengths) == (SIZES, LENGTHS)
        np.testing.assert_allclose(figures.losses, expected, rtol=0, atol=2e-5)
        assert figures.validation == found[0].validation


def test_masking_and_loss_at_the_ends_are_two_switches() -> None:
    tokens = torch.nn.functional.pad(row_of_documents(), (0, 1))
    is_end = tokens[:, :-1] == END
    for documents in ({}, {"documents": (tokens == END).cumsum(1)}):
        for mask_after in (None, END):
            item = {"tokens": tokens} | documents
            made = micro_batch(item, device=torch.device("cpu"), mask_after=mask_after)
            assert (made.context is None) == (not documents)
            assert (made.mask_BS is None) == (mask_after is None)
            if made.mask_BS is not None:
                assert torch.equal(made.mask_BS == 0, is_end)


def conversations(folder: Path, turn_end: int) -> dict[str, Any]:
    """Documents of four turns, the last two of which are labelled, each ended by `turn_end`."""
    rng = np.random.RandomState(2)
    with (
        IndexedDatasetWriter(folder / "chat", np.int32) as tokens,
        IndexedDatasetWriter(folder / "labels", np.int32) as labels,
    ):
        for _ in range(40):
            turns = [np.append(rng.randint(1, VOCABULARY, rng.randint(2, 7)), turn_end) for _ in range(4)]
            ids = np.concatenate(turns)
            tokens.add_document(ids)
            labels.add_document(np.where(np.arange(len(ids)) < len(turns[0]) + len(turns[1]), -100, ids))
    paths = {f"{split}_data_paths": [str(folder / "chat")] for split in ("train", "valid", "test")}
    return paths | {f"{split}_label_data_paths": [str(folder / "labels")] for split in ("train", "valid", "test")}


def first_loss(data: dict[str, Any], **changes: Any) -> float:
    flat = MODEL | TRAINING | SGD | data | {"init_method_std": 0.3, "tokenizer_type": "CharLevelTokenizer"} | changes
    return run_ranks(losses_of_a_step, 1, flat)[0]


def losses_of_a_step(flat: dict[str, Any]) -> float:
    config = config_from_dict(flat, world_size=1)
    mesh = build_mesh(config)
    engine = build_engine(config, mesh, fresh_weights(config))
    batch = batch_maker(config, mesh).next(train_loader(config, mesh, build_datasets(config), 0))
    return float(engine.evaluate(batch))


@pytest.mark.parametrize("turn_end", [END, 3], ids=["the tokenizer's end of document", "another token"])
def test_documents_are_those_of_the_index_whatever_ends_their_turns(tmp_path: Path, turn_end: int) -> None:
    data = conversations(tmp_path, turn_end)
    alone = {"pack_impl": "unpacked", "seq_length": 31}
    whole, masked = (first_loss(data, document_masking=masks, **alone) for masks in (False, True))
    assert masked == pytest.approx(whole, abs=1e-6)  # the row is one document, whose answer sees its question
    whole, masked = (first_loss(data, document_masking=masks, pack_impl="packed") for masks in (False, True))
    assert abs(masked - whole) > 1e-3  # the row has several, which do not see each other


def masks_and_tables(flat: dict[str, Any], world_size: int) -> tuple[int, int]:
    """How many masks a step makes on this rank, and how many rotary tables it holds."""
    made, build = [], Attention.mask

    def counted(self: Attention, *args: Any, **options: Any) -> torch.Tensor | None:
        made.append(options["keys"])
        return build(self, *args, **options)

    Attention.mask = counted
    torch.set_num_threads(1)
    config = config_from_dict(flat, world_size=world_size)
    mesh = build_mesh(config)
    engine = build_engine(config, mesh, fresh_weights(config))
    engine.train_step(batch_maker(config, mesh).next(train_loader(config, mesh, build_datasets(config), 0)))
    tables = {id(table) for m in engine.deepspeed.modules() if isinstance(m, RotaryEmbedding) for table in m.buffers()}
    return len(made), len(tables)


def test_blocks_of_a_stage_share_masks_and_tables(documents: str) -> None:
    changes = {"num_layers": 4, "pipe_parallel_size": 2, "gradient_accumulation_steps": 3, "train_batch_size": 12}
    flat = settings(documents, **changes)
    assert run_ranks(masks_and_tables, 2, flat, 2) == [(3, 2), (3, 2)]


def test_the_token_after_which_no_loss_is_taken_is_looked_up_before_any_worker_starts(documents: str) -> None:
    flat = settings(documents, tokenizer_type="HFTokenizer", vocab_file="absent.json")
    with pytest.raises(UserError, match=r"absent\.json"):
        prepare(config_from_dict(flat, world_size=1))
    prepare(config_from_dict(flat | {"eod_mask_loss": False}, world_size=1))
