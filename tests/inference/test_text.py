"""From texts to texts: stop strings, spaces at the seam, batching."""

from collections.abc import Sequence

import pytest
import torch
from inference.small_model import naive_greedy, small_model

from neox.data.tokenizers import CharLevelTokenizer
from neox.inference.generate import GenerationSettings
from neox.inference.text import StopStrings, TextCompletion, TextGenerator, continuation_text, cut_before


class _SpaceEatingTokenizer(CharLevelTokenizer):
    """Drops a space at the start of a text, as SentencePiece does."""

    def detokenize(self, ids: Sequence[int]) -> str:
        return super().detokenize(ids).removeprefix(" ")


def test_texts_come_back_in_order_and_whole() -> None:
    model, tokenizer = small_model(), CharLevelTokenizer()
    texts = ["b", "a longer prompt", "c c", "", "abc"]
    finished: list[int] = []
    results = TextGenerator(model, tokenizer, batch_size=2).complete(
        texts, settings=GenerationSettings(maximum_tokens=9), advance=finished.append
    )
    assert [result.context for result in results] == texts
    assert finished == [2, 2, 1]
    for text, result in zip(texts, results, strict=True):
        tokens = naive_greedy(model, tokenizer.tokenize(text) or [tokenizer.eod], 9)[0]
        end = tokens.index(tokenizer.eod) if tokenizer.eod in tokens else len(tokens)
        assert result.completion.tokens == tokens[:end]
        assert result.text == tokenizer.detokenize(tokens[:end])


def test_a_space_at_the_seam_is_kept() -> None:
    tokenizer = _SpaceEatingTokenizer()
    assert tokenizer.detokenize(tokenizer.tokenize(" world")) == "world"
    assert continuation_text(tokenizer, tokenizer.tokenize("hello"), tokenizer.tokenize(" world")) == " world"


def test_a_prompt_that_ends_inside_a_character_gives_the_new_tokens_alone() -> None:
    tokenizer, euro = CharLevelTokenizer(), list("€".encode())
    assert continuation_text(tokenizer, euro[:2], [*euro[2:], 65]) == tokenizer.detokenize([euro[2], 65])


def test_stop_strings_are_found_across_tokens_only_at_the_end() -> None:
    rule, tokenize = StopStrings(CharLevelTokenizer(), ["", "\n\n", "Q:"]), CharLevelTokenizer().tokenize
    assert rule(tokenize("some text\n\n"))
    assert rule(tokenize("abcQ:"))
    assert not rule(tokenize("abc\nQ"))


def test_text_is_cut_before_the_first_stop_string() -> None:
    assert cut_before("a. b\nc", ["\n", ". ", "", "zzz"]) == "a"
    assert cut_before("abc", ["x"]) == "abc"


def test_long_prompts_keep_their_end() -> None:
    generator = TextGenerator(small_model(), CharLevelTokenizer())
    settings = GenerationSettings(maximum_tokens=4)
    long = generator.complete(["x" * 100 + "tail"], settings=settings, keep_last=4)[0]
    assert long.text == generator.complete(["tail"], settings=settings)[0].text
    assert len(long.completion.tokens) == 4
    assert long.cut
    assert not generator.complete(["tail"], settings=settings, keep_last=4)[0].cut


class _TurnTokenizer(CharLevelTokenizer):
    """Shows two of its tokens as the ends of turns and of documents, and begins texts with a token."""

    prefix = (302,)
    ends = (0, 301)
    special = frozenset({0, 300, 301, 302})

    def detokenize(self, ids: Sequence[int]) -> str:
        names = {300: "<|im_start|>", 301: "<|im_end|>", 302: "<s>"}
        return "".join(names.get(token) or super(_TurnTokenizer, self).detokenize([token]) for token in ids)


def complete_with(
    monkeypatch: pytest.MonkeyPatch, drawn: Sequence[int], until: Sequence[str] = ()
) -> tuple[TextCompletion, list[int]]:
    """Complete "hi" with given tokens; return it, and the tokens that the model has read first."""
    tokens, read = iter(drawn), []
    model = small_model()
    monkeypatch.setattr("neox.inference.generate.draw_tokens", lambda *_: torch.tensor([next(tokens)]))
    model.embedding.register_forward_pre_hook(lambda _, given: read.append(given[0][0].tolist()))
    settings = GenerationSettings(maximum_tokens=len(drawn))
    return TextGenerator(model, _TurnTokenizer()).complete(["hi"], settings=settings, until=until)[0], read[0]


@pytest.mark.parametrize("end", [0, 301])
def test_a_text_ends_at_each_token_that_the_tokenizer_names(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    result, read = complete_with(monkeypatch, [97, 98, end, 99])
    assert (result.text, result.completion.tokens, result.completion.finished) == ("ab", [97, 98], True)
    assert read == [302, 104, 105]


def test_special_tokens_are_left_out_of_the_text_and_end_it_as_stop_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = complete_with(monkeypatch, [97, 300, 98])
    assert (result.text, result.completion.tokens) == ("ab", [97, 300, 98])
    stopped, _ = complete_with(monkeypatch, [97, 300, 98], until=["<|im_start|>"])
    assert (stopped.text, stopped.completion.finished) == ("a", True)
