"""Generation for a batch of prompts of different lengths.

Prompts are padded on the left, so that all rows end, and go on, in the same column. Padding is invisible to the
tokens of a row and positions count from its first token: every row gets what it would get alone.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from neox.config import Config
from neox.inference.cache import KeyValueCache
from neox.inference.sampling import GREEDY, Sampling, draw_tokens
from neox.model.attention import AttentionContext, with_shared_mask
from neox.model.layers import Decoder
from neox.model.positions import longest_input

StopRule = Callable[[list[int]], bool]
"""Whether a row should end, given the tokens generated for it so far."""


@dataclass(frozen=True)
class GenerationSettings:
    """What is asked of each prompt.

    Attributes:
        maximum_tokens: new tokens at most.
        sampling: how a token is drawn.
        recompute: read the whole sequence again for each token instead of caching keys and values.
        return_logits: keep the logits each token was drawn from.
        seed: of the draws; prompt i of a call draws from a stream of its own.
    """

    maximum_tokens: int = 64
    sampling: Sampling = GREEDY
    recompute: bool = False
    return_logits: bool = False
    seed: int = 1234

    @classmethod
    def from_config(cls, config: Config) -> "GenerationSettings":
        """Take the settings of `generate.py`."""
        asked = config.generation
        return cls(
            maximum_tokens=asked.maximum_tokens,
            sampling=Sampling(temperature=asked.temperature, top_k=asked.top_k, top_p=asked.top_p),
            recompute=asked.recompute,
            return_logits=asked.return_logits,
            seed=config.training.seed,
        )


@dataclass
class Completion:
    """What came after one prompt.

    Attributes:
        tokens: new tokens, without the one that ends the text.
        finished: whether the model ended it itself, or a stop rule did, before room or `maximum_tokens` ran out.
        message: one line on what the user should know, or None.
        duration_seconds: from the start of its batch until it was complete.
        logits: fp32 [new tokens, V], one row for each drawn token and, where one was drawn, one for that which ends
            the text; None unless asked for.
    """

    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    message: str | None = None
    duration_seconds: float = 0.0
    logits: torch.Tensor | None = None


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    settings: GenerationSettings,
    ends: Collection[int] = (),
    stop: StopRule | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """Continue every prompt, all of them as one batch.

    A prompt and its new tokens have the positions of the model (`longest_input`). Generation that meets this end
    stops there and says so in `message`, and so does a prompt that leaves no room at all.

    Args:
        model: in eval mode, with sequence parallelism off. Under tensor parallelism every rank of the group makes
            the same call and gets the same tokens.
        prompts: token ids, at least one each.
        settings: what is asked of each prompt.
        ends: tokens at which a text ends.
        stop: ends a row early.
        numbers: number of each prompt in the caller's list, which chooses its stream of random numbers; default
            0, 1, ... So results do not depend on how prompts are batched.

    Returns:
        Completions in the order of the prompts.
    """
    rows = _make_rows(model, prompts, settings, numbers=numbers)
    open_rows = [row for row in rows if row.budget > 0]
    if open_rows:
        _run(model, open_rows, settings, ends=ends, stop=stop)
    return [row.completion for row in rows]


@dataclass
class _Row:
    prompt: list[int]
    budget: int
    completion: Completion
    generator: torch.Generator
    logits: list[torch.Tensor] = field(default_factory=list)
    done: bool = False


def _make_rows(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    numbers: Sequence[int] | None,
) -> list[_Row]:
    rows = []
    positions = longest_input(model.config)
    for number, given in zip(numbers or range(len(prompts)), prompts, strict=True):
        prompt = list(given)
        assert prompt, "a prompt has at least the token that starts a text"
        room = positions - len(prompt)
        completion = Completion()
        if room <= 0:
            completion.message = (
                f"nothing generated: the prompt has {len(prompt)} tokens and the model {positions} positions; "
                "shorten it"
            )
        generator = torch.Generator(device=_device(model)).manual_seed(settings.seed + number)
        rows.append(_Row(prompt, min(settings.maximum_tokens, room), completion, generator))
    return rows


def _run(
    model: Decoder,
    rows: list[_Row],
    settings: GenerationSettings,
    *,
    ends: Collection[int],
    stop: StopRule | None,
) -> None:
    """Grow the rows until each is done."""
    started = time.perf_counter()
    batch = _Batch(model, [row.prompt for row in rows], max(row.budget for row in rows), recompute=settings.recompute)
    generators = [row.generator for row in rows]
    while not all(row.done for row in rows):
        logits_BV = batch.next_logits()
        tokens_B = draw_tokens(logits_BV, settings.sampling, generators)
        batch.append(tokens_B)
        for i, (row, token) in enumerate(zip(rows, tokens_B.tolist(), strict=True)):
            if row.done:
                continue
            if settings.return_logits:
                row.logits.append(logits_BV[i].cpu())
            _take(row, token, ends=ends, stop=stop, limit=longest_input(model.config))
            if row.done:
                row.completion.duration_seconds = time.perf_counter() - started
                row.completion.logits = torch.stack(row.logits) if settings.return_logits else None


def _take(row: _Row, token: int, *, ends: Collection[int], stop: StopRule | None, limit: int) -> None:
    """Add a token to a row and see whether it is the last."""
    completion = row.completion
    if token not in ends:
        completion.tokens.append(token)
    completion.finished = token in ends or (stop is not None and stop(completion.tokens))
    row.done = completion.finished or len(completion.tokens) >= row.budget
    if row.done and not completion.finished and len(row.prompt) + row.budget == limit:
        completion.message = f"stopped at the model's {limit} positions"


class _Batch:
    """Tokens of all rows, left-padded to end in the same column, and what the model has cached of them."""

    def __init__(self, model: Decoder, prompts: list[list[int]], new_tokens: int, *, recompute: bool) -> None:
        self.model = model
        width, device = max(map(len, prompts)), _device(model)
        self.padding_B = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
        self.padded = any(len(prompt) < width for prompt in prompts)
        padded = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
        self.tokens_BS = torch.zeros(len(prompts), width + new_tokens, dtype=torch.int64, device=device)
        self.tokens_BS[:, :width] = torch.tensor(padded, device=device)
        self.end = width
        self.cached = 0
        self.caches = None if recompute else [KeyValueCache(width + new_tokens) for _ in model.blocks]

    def append(self, tokens_B: torch.Tensor) -> None:
        """Put one more token at the end of each row."""
        self.tokens_BS[:, self.end] = tokens_B
        self.end += 1

    def next_logits(self) -> torch.Tensor:
        """fp32 logits [B, V] of the tokens that come next."""
        contexts = self._contexts(self.cached)
        hidden_BSD = self.model.hidden(self.tokens_BS[:, self.cached : self.end], contexts)
        if self.caches is not None:
            self.cached = self.end
        return self.model.head(hidden_BSD[:, -1:])[:, 0].float()

    def _contexts(self, start: int) -> list[AttentionContext]:
        """Tell each block about the columns from `start` to the end."""
        columns_S = torch.arange(start, self.end, device=self.tokens_BS.device)
        # Rows that are done are carried along beyond the last position; what they get there is thrown away.
        positions_BS = (columns_S - self.padding_B[:, None]).clamp(0, longest_input(self.model.config) - 1)
        mask_BSK = self._mask(columns_S) if self.padded or start > 0 else None
        context = AttentionContext(positions_BS=positions_BS, mask_BSK=mask_BSK)
        blocks, weight = self.model.blocks, self.model.embedding.word_embeddings.weight
        context = with_shared_mask(context, blocks[0].attention, weight)
        caches = [None] * len(blocks) if self.caches is None else self.caches
        return [replace(context, cache=cache) for cache in caches]

    def _mask(self, columns_S: torch.Tensor) -> torch.Tensor:
        """Mark where a token may see another: itself or an earlier one that is no padding.

        Padding sees itself, as the softmax of a row without any key is not a number.
        """
        keys_K = torch.arange(self.end, device=columns_S.device)
        itself_SK = keys_K == columns_S[:, None]
        earlier_SK = keys_K < columns_S[:, None]
        real_BK = keys_K >= self.padding_B[:, None]
        return itself_SK | (earlier_SK & real_BK[:, None])


def _device(model: Decoder) -> torch.device:
    return model.embedding.word_embeddings.weight.device
