"""Tokenizers: special tokens, round trips, upstream's tokenization, and clear refusals."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import requests
import sentencepiece
import tiktoken
import tokenizers
import transformers
from data_pipeline.golden_files import FOLDER, read_json
from tokenizers import models, pre_tokenizers

from neox.data import build_tokenizer, padded_vocab_size
from neox.data.tokenizers.base import END_OF_DOCUMENT, PADDING
from neox.data.tokenizers.train import save_tokenizer, train_bpe
from neox.errors import DataError

CORPUS = "def add(a, b):\n    return a + b\n\nnaïve café 東京 — the end. " * 40


def options(tokenizer_type: str, vocab_file: object = None, merge_file: object = None) -> SimpleNamespace:
    """Return a tokenizer section."""
    return SimpleNamespace(
        tokenizer_type=tokenizer_type,
        vocab_file=vocab_file and str(vocab_file),
        merge_file=merge_file and str(merge_file),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small BPE tokenizer; return its file."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "corpus.txt").write_text(CORPUS, encoding="utf-8")
    save_tokenizer(train_bpe([folder / "corpus.txt"], vocab_size=300), folder / "tokenizer.json")
    return folder / "tokenizer.json"


def test_trained_tokenizer_round_trips_and_has_its_special_tokens(trained: Path) -> None:
    tokenizer = build_tokenizer(options("HFTokenizer", trained))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (300, 0, 1)
    ids = tokenizer.tokenize(CORPUS)
    assert tokenizer.detokenize(ids) == CORPUS
    assert len(ids) < len(CORPUS.encode()) * 0.7
    assert tokenizer.tokenize("a<|endoftext|>b").count(0) == 1
    assert tokenizer.detokenize(tokenizer.tokenize("\U0001f680 \x00")) == "\U0001f680 \x00"  # bytes never seen
    assert tokenizer.tokenize_batch(["x y", "", "東"]) == [tokenizer.tokenize(text) for text in ("x y", "", "東")]
    assert tokenizer.detokenize([*tokenizer.tokenize("ab"), 303]) == "ab"


def test_nfkc_is_upstreams_normalization_and_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text(CORPUS, encoding="utf-8")
    ligature = "ﬁne"
    for nfkc, text in ((True, "fine"), (False, ligature)):
        tokenizer = train_bpe([tmp_path / "c.txt"], vocab_size=280, nfkc=nfkc)
        assert tokenizer.decode(tokenizer.encode(ligature).ids) == text


def test_a_vocabulary_smaller_than_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least 258"):
        train_bpe([tmp_path], vocab_size=100)


def test_truncation_in_the_file_is_switched_off(trained: Path, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(trained))
    backend.enable_truncation(4)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "t.json"))
    text = "def add(a, b): return b + a"
    cut, whole = (build_tokenizer(options("HFTokenizer", path)) for path in (tmp_path / "t.json", trained))
    assert cut.tokenize(text) == whole.tokenize(text)
    assert len(whole.tokenize(text)) > 10


def _with_specials(trained: Path, path: Path, names: list[str]) -> Path:
    content = json.loads(trained.read_text())
    for number, name in enumerate(names):
        old = content["added_tokens"][number]["content"]
        content["added_tokens"][number]["content"] = name
        content["model"]["vocab"][name] = content["model"]["vocab"].pop(old)
    path.write_text(json.dumps(content))
    return path


def test_another_end_of_document_is_found(trained: Path, tmp_path: Path) -> None:
    path = _with_specials(trained, tmp_path / "t.json", ["<unk>", "</s>"])
    tokenizer = build_tokenizer(options("HFTokenizer", path))
    assert (tokenizer.eod, tokenizer.pad) == (1, 1)


def test_no_end_of_document_names_what_there_is(trained: Path, tmp_path: Path) -> None:
    path = _with_specials(trained, tmp_path / "t.json", ["<unk>", "[MASK]"])
    tokenizer = build_tokenizer(options("HFTokenizer", path))
    assert tokenizer.detokenize(tokenizer.tokenize("def add")) == "def add"
    assert tokenizer.ends == ()
    for ask in ("eod", "pad", "start"):
        with pytest.raises(DataError, match=r"special tokens are <unk>, \[MASK\]"):
            getattr(tokenizer, ask)


def test_gpt2_files_tokenize_as_the_json_of_the_same_vocabulary(trained: Path, tmp_path: Path) -> None:
    model = json.loads(trained.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    gpt2 = build_tokenizer(options("GPT2BPETokenizer", tmp_path / "vocab.json", tmp_path / "merges.txt"))
    json_file = build_tokenizer(options("HFTokenizer", trained))
    text = " def café 東京\n\tend<|endoftext|>x"
    assert gpt2.tokenize(text) == json_file.tokenize(text)
    assert gpt2.eod == 0
    assert gpt2.vocab_size == 300
    assert gpt2.detokenize(gpt2.tokenize(text)) == text


def test_gpt2_tokenization_is_upstreams() -> None:
    """The files hold the merges of GPT-2 that can occur in these texts; the token numbers are GPT-2's."""
    files = FOLDER / "gpt2_subset_vocab.json", FOLDER / "gpt2_subset_merges.txt"
    tokenizer = build_tokenizer(options("GPT2BPETokenizer", *files))
    for text, ids in read_json("tokenize_gpt2json.json").items():
        assert tokenizer.tokenize(text) == ids
        assert tokenizer.detokenize(ids) == text
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (50_257, 50_256, 50_256)


def _sentencepiece(path: Path, **settings: object) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 5),
        model_writer=model,
        vocab_size=110,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    path.write_bytes(model.getvalue())
    return path


def test_sentencepiece_ends_documents_with_its_own_token_never_unk(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(options("SPMTokenizer", _sentencepiece(tmp_path / "m.model")))
    assert (tokenizer.eod, tokenizer.pad) == (2, 2)  # </s>; <unk> is 0
    text = "return a + b the end."
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.tokenize_batch([text, ""]) == [tokenizer.tokenize(text), []]


def test_sentencepiece_prefers_the_piece_of_that_name(tmp_path: Path) -> None:
    path = _sentencepiece(tmp_path / "m.model", user_defined_symbols=["<|endoftext|>", "<|padding|>"])
    tokenizer = build_tokenizer(options("SPMTokenizer", path))
    assert (tokenizer.eod, tokenizer.pad) == (3, 4)
    assert tokenizer.ends == (3, 2)  # a text also ends at the model's own </s>


def test_sentencepiece_without_any_end_is_refused(tmp_path: Path) -> None:
    path = _sentencepiece(tmp_path / "m.model", eos_id=-1)
    with pytest.raises(DataError, match="neither a piece"):
        build_tokenizer(options("SPMTokenizer", path))


def test_characters_are_bytes() -> None:
    tokenizer = build_tokenizer(options("CharLevelTokenizer"))
    assert tokenizer.tokenize("aé") == [97, 195, 169]
    assert tokenizer.detokenize([97, 195, 169, 300]) == "aé"
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (512, 0, 1)


@pytest.mark.parametrize(
    ("kind", "vocab", "merges", "message"),
    [
        ("WordTokenizer", None, None, "'WordTokenizer' is unknown; use GPT2BPETokenizer"),
        ("HFTokenizer", None, None, "needs a file: set vocab_file"),
        ("HFTokenizer", "missing.json", None, r"missing\.json: no such file"),
        ("HFTokenizer", str(FOLDER), None, "is a folder; give the file in it that HFTokenizer reads"),
        ("SPMTokenizer", str(FOLDER), None, "is a folder; give the file in it that SPMTokenizer reads"),
        ("HFGPT2Tokenizer", str(FOLDER), None, "neither a folder with a GPT-2 tokenizer"),
        ("HFGPT2Tokenizer", __file__, None, "neither a folder with a GPT-2 tokenizer"),
        ("HFGPT2Tokenizer", f"{FOLDER}/missing", None, "neither a folder with a GPT-2 tokenizer"),
        ("TiktokenTokenizer", "cl200k", None, "cl200k: no such tiktoken encoding; there are "),
        ("HFTokenizer", __file__, None, "not a tokenizers JSON file"),
        ("GPT2BPETokenizer", __file__, None, "set merge_file"),
        ("GPT2BPETokenizer", __file__, __file__, "not a GPT-2 vocabulary"),
        ("SPMTokenizer", __file__, None, "not a SentencePiece model"),
    ],
)
def test_mistakes_are_one_line(kind: str, vocab: str | None, merges: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        build_tokenizer(options(kind, vocab, merges))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab", "size", "padded"),
    [(50_257, 1, 50_304), (50_257, 2, 50_432), (50_257, 8, 51_200), (50_277, 4, 50_688), (128, 1, 128)],
)
def test_padded_vocabulary(vocab: int, size: int, padded: int) -> None:
    assert padded_vocab_size(vocab, divisible_by=128, model_parallel_size=size) == padded


def test_a_folder_names_the_file_in_it(trained: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; give .*/tokenizer\.json"):
        build_tokenizer(options("HFTokenizer", trained.parent))


def test_a_tokenizer_that_makes_nothing_of_text_is_refused(tmp_path: Path) -> None:
    special = [END_OF_DOCUMENT, PADDING]
    for number, vocabulary in enumerate(({}, {token: place for place, token in enumerate(special)})):
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.add_special_tokens(special)
        backend.save(str(tmp_path / f"{number}.json"))
        with pytest.raises(DataError, match=rf"{number}\.json: has no tokens except special ones"):
            build_tokenizer(options("HFTokenizer", tmp_path / f"{number}.json"))
    (tmp_path / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(special)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(DataError, match="has no tokens except special ones"):
        build_tokenizer(options("GPT2BPETokenizer", tmp_path / "vocab.json", tmp_path / "merges.txt"))
    (tmp_path / "empty.model").touch()
    with pytest.raises(DataError, match="not a SentencePiece model"):
        build_tokenizer(options("SPMTokenizer", tmp_path / "empty.model"))


def test_a_vocabulary_of_a_few_words_or_of_one_script_is_none_that_is_empty(tmp_path: Path) -> None:
    for name, vocabulary in (("words", {"C4": 0, "D4": 1}), ("script", {"漢": 0, "字": 1})):
        model = models.WordLevel(vocabulary, unk_token="absent") if name == "words" else models.BPE(vocabulary, [])
        backend = tokenizers.Tokenizer(model)
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([END_OF_DOCUMENT])
        backend.save(str(tmp_path / f"{name}.json"))
        tokenizer = build_tokenizer(options("HFTokenizer", tmp_path / f"{name}.json"))
        assert tokenizer.tokenize(next(iter(vocabulary))) == [0]


def test_gpt2_through_transformers_has_a_row_for_each_id(tmp_path: Path) -> None:
    """Of a folder with a vocabulary that leaves numbers out, and no network for one without."""
    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    (tmp_path / "vocab.json").write_text(json.dumps(alphabet | {END_OF_DOCUMENT: 300}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = build_tokenizer(options("HFGPT2Tokenizer", tmp_path))
    assert tokenizer.eod == 300
    assert tokenizer.vocab_size == 1 + max(tokenizer.eod, tokenizer.pad)
    assert tokenizer.detokenize(tokenizer.tokenize("naïve")) == "naïve"


def test_what_is_a_path_is_looked_for_here_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def from_pretrained(source: str, *, local_files_only: bool) -> None:
        asked[source] = local_files_only
        raise OSError

    monkeypatch.setattr(transformers.GPT2TokenizerFast, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for source in ("folder", "folder/missing", "gpt2", "openai-community/gpt2"):
        with pytest.raises(DataError, match=f"vocab_file: {source}: neither a folder"):
            build_tokenizer(options("HFGPT2Tokenizer", source))
    assert asked == {"folder": True, "folder/missing": True, "gpt2": False, "openai-community/gpt2": False}


def test_an_encoding_of_tiktoken_that_cannot_be_downloaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (requests.exceptions.ConnectionError("a\nb"), ValueError("damaged"), PermissionError("cache")):
        monkeypatch.setattr(tiktoken, "get_encoding", Mock(side_effect=error))
        with pytest.raises(DataError, match=r"p50k_base: .* set TIKTOKEN_CACHE_DIR to a folder") as caught:
            build_tokenizer(options("TiktokenTokenizer", "p50k_base"))
        assert "\n" not in str(caught.value)


def test_a_byte_order_mark_before_a_vocabulary_is_dropped(trained: Path, tmp_path: Path) -> None:
    content = trained.read_text(encoding="utf-8")
    model = json.loads(content)["model"]
    merges = "#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in model["merges"])
    for name, text in (("t.json", content), ("v.json", json.dumps(model["vocab"])), ("m.txt", merges)):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    text = "def café 東京"
    expected = build_tokenizer(options("HFTokenizer", trained)).tokenize(text)
    assert build_tokenizer(options("HFTokenizer", tmp_path / "t.json")).tokenize(text) == expected
    gpt2 = build_tokenizer(options("GPT2BPETokenizer", tmp_path / "v.json", tmp_path / "m.txt"))
    assert gpt2.tokenize(text) == expected
    (tmp_path / "m.txt").write_text(merges + "three of them\n", encoding="utf-8")
    with pytest.raises(DataError, match="not a GPT-2 vocabulary"):
        build_tokenizer(options("GPT2BPETokenizer", tmp_path / "v.json", tmp_path / "m.txt"))
