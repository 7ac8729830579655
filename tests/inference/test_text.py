"""From texts to texts: stop strings, spaces at the seam, batching."""

from collections.abc import Sequence

from inference.small_model import naive_greedy, small_model

from neox.data.tokenizers import CharLevelTokenizer
from neox.inference.generate import GenerationSettings
from neox.inference.text import StopStrings, TextGenerator, continuation_text, cut_before


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
