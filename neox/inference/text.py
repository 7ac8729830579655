"""Generation from texts to texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from neox.data.tokenizers import Tokenizer, prompt_tokens
from neox.inference.generate import Completion, GenerationSettings, generate
from neox.model.layers import Decoder


@dataclass(frozen=True)
class TextCompletion:
    """A prompt's text, what followed it, and the tokens behind that.

    Attributes:
        cut: whether only the end of the prompt was read.
    """

    context: str
    text: str
    completion: Completion
    cut: bool = False


@dataclass(frozen=True)
class TextGenerator:
    """A model with its tokenizer.

    Attributes:
        batch_size: prompts generated at a time.
    """

    model: Decoder
    tokenizer: Tokenizer
    batch_size: int = 1

    def complete(
        self,
        contexts: Sequence[str],
        *,
        settings: GenerationSettings,
        until: Sequence[str] = (),
        keep_last: int | None = None,
        numbers: Sequence[int] | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> list[TextCompletion]:
        """Continue every text.

        Args:
            contexts: prompts; an empty one starts a document.
            settings: what is asked of each.
            until: strings that end a text; it is cut before the first of them.
            keep_last: read only this many tokens of a longer prompt, the last ones.
            numbers: see `generate`.
            advance: told the number of texts whenever some are complete.

        Returns:
            Results in the order of the prompts, whatever order they ran in.
        """
        prompts = [prompt_tokens(self.tokenizer, text) or [self.tokenizer.eod] for text in contexts]
        lengths = [len(prompt) for prompt in prompts]
        if keep_last is not None:
            prompts = [prompt[-keep_last:] for prompt in prompts]
        numbers = numbers or range(len(prompts))
        stop = StopStrings(self.tokenizer, until) if any(until) else None
        results: dict[int, TextCompletion] = {}
        # Prompts of like length together: little padding.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            completions = generate(
                self.model,
                [prompts[i] for i in chosen],
                settings=settings,
                ends=self.tokenizer.ends,
                stop=stop,
                numbers=[numbers[i] for i in chosen],
            )
            for i, completion in zip(chosen, completions, strict=True):
                text = continuation_text(self.tokenizer, prompts[i], completion.tokens)
                is_cut = len(prompts[i]) < lengths[i]
                results[i] = TextCompletion(contexts[i], cut_before(text, until), completion, is_cut)
            if advance is not None:
                advance(len(chosen))
        return [results[i] for i in range(len(prompts))]


class StopStrings:
    """A stop rule: one of some strings has appeared.

    Only the last tokens are turned into text, as many as the longest string has bytes: a token that adds to a
    text adds at least one.
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.strings = [string for string in strings if string]
        self.window = max(len(string.encode()) for string in self.strings) + 1

    def __call__(self, tokens: list[int]) -> bool:
        """Whether the end of `tokens` holds one of the strings."""
        tail = self.tokenizer.detokenize(tokens[-self.window :])
        return any(string in tail for string in self.strings)


def continuation_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Text of `tokens` as it follows that of `prompt`, without special tokens.

    Some tokenizers drop a space at the start of a text, so the new part is taken from the text of both. Where the
    prompt ends inside a character its own text changes, and the new tokens are turned into text alone.
    """
    tokens = [token for token in tokens if token not in tokenizer.special]
    before = tokenizer.detokenize(prompt)
    whole = tokenizer.detokenize([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.detokenize(tokens)


def cut_before(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first occurrence of any of the strings."""
    places = [text.find(string) for string in strings if string and string in text]
    return text[: min(places)] if places else text
