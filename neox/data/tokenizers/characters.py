"""Bytes as tokens, for toy models and tests."""

from collections.abc import Sequence


class CharLevelTokenizer:
    """The UTF-8 bytes of a text. 512 slots as upstream's; token 0 ends a document and 1 pads."""

    name = "CharLevelTokenizer"
    vocab_size = 512
    eod = start = 0
    pad = 1
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    ends: tuple[int, ...] = (eod,)
    special: frozenset[int] = frozenset()

    def tokenize(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode("utf-8"))

    tokenize_bare = tokenize

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the bytes of each text."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of bytes; the slots above 255 give nothing, broken UTF-8 gives U+FFFD."""
        return bytes(int(token) for token in ids if token < 256).decode("utf-8", errors="replace")
