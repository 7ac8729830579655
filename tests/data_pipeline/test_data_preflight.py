"""What is said of the data before a run reads them."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from data_pipeline.test_build import make_config

from neox.data import IndexedDatasetWriter
from neox.data.preflight import check_data, data_remarks
from neox.errors import DataError

CHARACTERS = {"tokenizer_type": "CharLevelTokenizer", "padded_vocab_size": 512}
END = 0


def corpus(prefix: Path, documents: list[list[int]], dtype: str = "int32") -> str:
    with IndexedDatasetWriter(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype))
    return str(prefix)


PLAIN = [[5, 6, 7, END]] * 5


def remarks(**changes: object) -> list[str]:
    config = make_config(**CHARACTERS | changes)
    check_data(config)
    return list(data_remarks(config))


def test_a_split_without_documents_for_an_evaluation_is_told(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "five", PLAIN)
    assert remarks(data_path=prefix, split="969,30,1") == [
        f"{prefix}: split 969,30,1 gives validation 0 of 5 documents, so there is no validation",
        f"{prefix}: split 969,30,1 gives test 0 of 5 documents, so there is no test",
    ]
    assert remarks(data_path=prefix, split="60,20,20") == []
    assert remarks(data_path=prefix, split="969,30,1", eval_iters=0) == []
    assert remarks(data_path=prefix, split="969,30,1", do_valid=False, do_test=False) == []


@pytest.mark.parametrize(
    ("split", "changes", "name"),
    [
        ("969,30,1", {"do_valid": True}, "validation"),
        ("969,30,1", {"do_test": True, "do_valid": False}, "test"),
        ("0,1,1", {}, "training"),
    ],
)
def test_a_split_without_documents_for_what_is_asked_is_a_mistake(
    tmp_path: Path, split: str, changes: dict[str, bool], name: str
) -> None:
    prefix = corpus(tmp_path / "five", PLAIN)
    with pytest.raises(DataError, match=f"five: split {split} gives {name} 0 of 5 documents; give it a larger share"):
        remarks(data_path=prefix, split=split, **changes)
    if name == "training":
        assert remarks(data_path=prefix, split=split, do_train=False) == []


def test_validation_that_never_takes_place_is_told(tmp_path: Path) -> None:
    data = {"data_path": corpus(tmp_path / "five", PLAIN), "split": "60,20,20"}
    assert remarks(**data, eval_interval=11) == ["eval_interval 11: above train_iters 10, so there is no validation"]
    assert remarks(**data, eval_interval=10) == []
    assert remarks(**data, eval_iters=0, do_valid=True, do_test=False) == [
        "do_valid: eval_iters is 0, so there is no validation"
    ]


def test_the_end_of_document_inside_of_documents_is_told(tmp_path: Path) -> None:
    turns = corpus(tmp_path / "turns", [[5, END, 6, END], [5, END], [7, 8]])
    where = f"{turns}: of the first 3 documents"
    data = {"data_path": turns, "split": "1,0,0"}
    data |= {"do_valid": False, "do_test": False}
    assert remarks(**data) == []
    assert remarks(**data, eod_mask_loss=True) == [
        f"{where} 1 have the end-of-document token 0 inside; eod_mask_loss masks the loss there"
    ]
    assert remarks(**data, document_masking=True) == [
        f"{where} 1 have the end-of-document token 0 inside; document_masking does not cut there"
    ]
    without = corpus(tmp_path / "without", [[5, 6], [7]])
    assert remarks(**data | {"data_path": without}, eod_mask_loss=True, document_masking=True) == [
        f"{without}: of the first 2 documents none has the end-of-document token 0, so eod_mask_loss masks nothing"
    ]
    plain = corpus(tmp_path / "plain", PLAIN)
    assert remarks(**data | {"data_path": plain}, eod_mask_loss=True, document_masking=True) == []


def test_a_vocabulary_without_an_end_of_document_does_for_the_masks_of_documents(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "tokenizer.json")}
    data = {"data_path": corpus(tmp_path / "plain", PLAIN), "split": "1,0,0", "do_valid": False, "do_test": False}
    assert remarks(**data, **tokenizer, document_masking=True) == []
    with pytest.raises(DataError, match=r"tokenizer\.json: has no <\|endoftext\|>"):
        remarks(**data, **tokenizer, eod_mask_loss=True)


@pytest.mark.parametrize("odd_one", ["train", "valid", "test", "label"])
def test_every_list_of_data_is_looked_at(tmp_path: Path, odd_one: str) -> None:
    good, bad = corpus(tmp_path / "good", PLAIN), corpus(tmp_path / "bad", [[5, 6, 512, END]] * 5)
    lists = {split: [bad if split == odd_one else good] for split in ("train", "valid", "test")}
    data = {f"{split}_data_paths": paths for split, paths in lists.items()}
    data["train_label_data_paths"] = [bad if odd_one == "label" else good]
    with pytest.raises(DataError, match="bad: has token id 512, but the vocabulary of the model has 512 rows"):
        remarks(**data, pack_impl="unpacked")


@pytest.mark.parametrize("odd_one", ["pos_train", "neg_train", "neg_train_label"])
def test_preferences_are_looked_at(tmp_path: Path, odd_one: str) -> None:
    good, bad = corpus(tmp_path / "good", PLAIN), corpus(tmp_path / "bad", [[5, 6, 512, END]] * 5)
    kinds = [f"{side}_{split}{kind}" for side in ("pos", "neg") for split in ("train",) for kind in ("", "_label")]
    data = {f"{kind}_data_paths": [bad if kind == odd_one else good] for kind in kinds}
    config = make_config(
        **CHARACTERS, **data, train_impl="rm", dataset_impl="pairwise", pack_impl="unpacked", split=None, eval_iters=0
    )
    with pytest.raises(DataError, match="bad: has token id 512"):
        check_data(config)


def test_documents_that_are_cut_or_left_out_are_counted(tmp_path: Path) -> None:
    """Packed ones go on in the next sample; of others the rest is never read."""
    long = list(range(5, 5 + make_config(**CHARACTERS).model.seq_length + 2))
    prefix = corpus(tmp_path / "long", [*PLAIN, long])
    most = len(long) - 1
    given = {"data_path": prefix, "split": "1,0,0", "eval_iters": 0}
    assert remarks(**given) == []
    line = f"{prefix}: 1 of 6 documents have more than seq_length + 1 = {most} tokens and are "
    assert remarks(**given, pack_impl="unpacked") == [line + "cut there"]
    assert remarks(**given, pack_impl="pack_until_overflow", allow_chopped=False) == [line + "left out"]


def test_an_evaluation_without_the_labels_of_training_is_said(tmp_path: Path) -> None:
    prefix = corpus(tmp_path / "five", PLAIN)
    lists = {f"{split}_data_paths": [prefix] for split in ("train", "valid", "test")} | {"do_test": False}
    labels = {"train_label_data_paths": [prefix]}
    assert remarks(**lists, data_path=None) == []
    (line,) = remarks(**lists, **labels, data_path=None)
    assert line.startswith(
        "valid_label_data_paths: not set, and train_label_data_paths is, so validation takes the loss"
    )
    assert remarks(**lists, **labels, valid_label_data_paths=[prefix], data_path=None) == []
