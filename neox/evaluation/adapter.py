"""Our model as lm-evaluation-harness asks for one: scores of texts, and generated texts.

Follows the interface of `lm_eval.api.model.TemplateLM` (0.4.9 and later), which splits a context and its
continuation into tokens the same way for all models, so that numbers compare with those of other models.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from neox.data.text_files import without_lone_surrogates
from neox.data.tokenizers import Tokenizer, prompt_tokens
from neox.errors import UserError
from neox.inference.generate import GenerationSettings
from neox.inference.sampling import GREEDY, Sampling
from neox.inference.text import TextGenerator
from neox.model.build import SINGLE
from neox.model.layers import Decoder
from neox.model.loss import CHUNK_BYTES, token_losses
from neox.model.positions import longest_input
from neox.parallel.mesh import Mesh

DEFAULT_NEW_TOKENS = 256
"""Of a task that does not say; what the harness' own models take."""

_HONOURED = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")
_NEUTRAL = {"num_beams": 1, "repetition_penalty": 1, "num_return_sequences": 1}
"""What `generation_kwargs` may hold besides without a change of what is generated."""


@dataclass(frozen=True)
class Passage:
    """Tokens to score: every token of `continuation`, given those before it."""

    context: list[int]
    continuation: list[int]


class HarnessModel(TemplateLM):
    """Scores and generates with a Decoder.

    The copies of the model in `mesh` share the documents of each task; tensor-parallel ranks of a copy do the
    same work together.

    Args:
        model: in eval mode, on the device of `mesh`.
        tokenizer: its tokenizer; its `start` stands for an empty context.
        batch_size: sequences of one forward pass.
        mesh: the processes.
        info: what the result file should say about the model.

    Attributes:
        cut: requests whose context was longer than the model's positions, so that only its end was read.
        replaced: whether a text had lone surrogates, which were replaced by U+FFFD.
        ignored: entries of a task's `generation_kwargs` that are not honoured, `num_beams 10` say.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 1,
        mesh: Mesh = SINGLE,
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokens = tokenizer
        self.batch_size = batch_size
        self.mesh = mesh
        self.info = info or {}
        self.cut, self.replaced = 0, False
        self.ignored: set[str] = set()
        self._rank, self._world_size, self._device = mesh.data_rank, mesh.data_size, mesh.device

    # What the harness asks about the model.

    @property
    def eot_token_id(self) -> int:
        """Token that ends a document."""
        return self.tokens.eod

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return longest_input(self.model.config)

    @property
    def prefix_token_id(self) -> int:
        """Token that stands before a text without a context. It is never scored."""
        return self.tokens.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, after those with which the tokenizer begins one unless `add_special_tokens` is false."""
        text = self._cleaned(string)
        return self.tokens.tokenize_bare(text) if add_special_tokens is False else prompt_tokens(self.tokens, text)

    def _cleaned(self, text: str) -> str:
        cleaned: str = without_lone_surrogates(text)
        self.replaced = self.replaced or cleaned != text
        return cleaned

    def get_model_info(self) -> dict[str, Any]:
        """Return what the result file says about the model."""
        return self.info

    # How its copies in several processes talk to each other.

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the scalar of each copy, [copies]."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self.mesh.data_group)
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the object of each copy, on the copy `dst`."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.mesh.data_group)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Wait for the other copies."""
        dist.barrier(group=self.mesh.data_group)

    # The work.

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether greedy decoding would give it."""
        # A context of spaces alone has none left: the harness moves them to the continuation.
        start = [self.prefix_token_id]
        passages = [Passage(context or start, continuation) for _, context, continuation in requests]
        return self.score(passages, progress=not disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats.

        Every token is scored once. A text longer than `max_length` is scored in windows; the last reaches back for
        context as far as it can, the others begin with one token of it.
        """
        passages: list[Passage] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in self._windows(request.args[0]):
                passages.append(window)
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self.score(passages, progress=not disable_tqdm), strict=True):
            totals[owner] += score
        return totals

    def _windows(self, text: str) -> Iterator[Passage]:
        windows = get_rolling_token_windows(
            token_list=self._without_prefix(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        for window in windows:
            context, continuation = make_disjoint_window(window)
            yield Passage(context, continuation)

    def _without_prefix(self, text: str) -> list[int]:
        """Tokens of a text that are scored: what begins it stands before it, also where the text spells it out."""
        tokens, prefix = self.tok_encode(text, add_special_tokens=False), list(self.tokens.prefix)
        return tokens[len(prefix) :] if tokens[: len(prefix)] == prefix else tokens

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate texts, each cut before the first of its task's stop strings.

        A prompt that leaves too little room for the new tokens keeps its end.

        Raises:
            UserError: a task wants more new tokens than the model has positions, or a value that means nothing.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts: dict[int, str] = {}
        with self._bar(len(requests), "generating", show=not disable_tqdm) as bar:
            for numbers in groups.values():
                wanted, settings = _settings(requests[numbers[0]].args[1])
                self.ignored |= _ignored(wanted)
                results = TextGenerator(self.model, self.tokens, self.batch_size).complete(
                    [self._cleaned(requests[number].args[0]) for number in numbers],
                    settings=settings,
                    until=wanted["until"],
                    keep_last=self._room_for(wanted["max_gen_toks"]),
                    numbers=numbers,
                    advance=bar.update,
                )
                self.cut += sum(result.cut for result in results)
                texts |= {number: result.text for number, result in zip(numbers, results, strict=True)}
        return [texts[number] for number in range(len(requests))]

    def _room_for(self, new_tokens: int) -> int:
        """Positions that are left for a prompt."""
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"eval_tasks: a task generates {new_tokens} tokens and the model has {self.max_length} positions; "
                "set a smaller max_gen_toks in the task's generation_kwargs"
            )
        return room

    @torch.inference_mode()
    def score(self, passages: Sequence[Passage], *, progress: bool = False) -> list[tuple[float, bool]]:
        """Score passages in batches of like length.

        Returns:
            For each: log-likelihood of its continuation in nats, and whether every token of it is the likeliest.
        """
        results: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i].context) - len(passages[i].continuation))
        with self._bar(len(passages), "scoring", show=progress) as bar:
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                results |= dict(zip(chosen, self._score_batch([passages[i] for i in chosen]), strict=True))
                bar.update(len(chosen))
        return [results[i] for i in range(len(passages))]

    def _score_batch(self, passages: list[Passage]) -> list[tuple[float, bool]]:
        """Pad on the right, where causal attention does not look, and score the positions before continuations."""
        inputs = [self._input(passage) for passage in passages]
        width = max(1, *map(len, inputs))
        padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in inputs], device=self._device)
        hidden_BSD = self.model.hidden(padded)
        spans = [(len(tokens) - len(p.continuation), len(tokens)) for tokens, p in zip(inputs, passages, strict=True)]
        hidden_MD = torch.cat([hidden_BSD[row, start:end] for row, (start, end) in enumerate(spans)])
        labels = [token for passage in passages for token in passage.continuation]
        losses_M, hits_M = self._losses(hidden_MD, torch.tensor(labels, dtype=torch.int64, device=self._device))
        lengths = [end - start for start, end in spans]
        scores = zip(losses_M.cpu().double().split(lengths), hits_M.cpu().split(lengths), strict=True)
        return [(-losses.sum().item(), bool(hits.all())) for losses, hits in scores]

    def _input(self, passage: Passage) -> list[int]:
        """Return what the model reads: all but the last token, and of that the end, if it is too long."""
        if len(passage.continuation) > self.max_length:
            raise UserError(
                f"eval_tasks: a text to score has {len(passage.continuation)} tokens and the model {self.max_length} "
                "positions; leave the task out or use a model of longer sequences"
            )
        whole = (passage.context + passage.continuation)[:-1]
        self.cut += len(whole) > self.max_length
        return whole[-self.max_length :]

    def _losses(self, hidden_MD: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of each label, and whether it is the likeliest token; logits are made a chunk at a time."""
        chunk = max(1, CHUNK_BYTES // (4 * self.model.head.vocabulary.size))
        losses, hits = [], []
        for hidden, labels in zip(hidden_MD.split(chunk), labels_M.split(chunk), strict=True):
            logits_BSV = self.model.head(hidden[None])
            losses.append(token_losses(logits_BSV, labels[None])[0])
            hits.append(logits_BSV[0].argmax(dim=-1) == labels)
        return torch.cat(losses), torch.cat(hits)

    def _bar(self, total: int, what: str, *, show: bool) -> "tqdm[Any]":
        return tqdm(total=total, desc=what, disable=not show or self.mesh.rank != 0)


def _ignored(wanted: dict[str, Any]) -> set[str]:
    """The entries of normalised `generation_kwargs` that would change what is generated, and do not here."""
    return {
        f"{name} {value}"
        for name, value in wanted.items()
        if name not in _HONOURED and value is not None and value != _NEUTRAL.get(name)
    }


def _settings(asked: dict[str, Any]) -> tuple[dict[str, Any], GenerationSettings]:
    """Read a task's `generation_kwargs`; return them in the harness' normal form too.

    Raises:
        UserError: a value that means nothing.
    """
    try:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(asked, DEFAULT_NEW_TOKENS))
        # Of a task that samples and says no more, transformers' default.
        sampling = Sampling(temperature=float(wanted.get("temperature", 1.0)))
        if wanted["do_sample"]:
            top_k, top_p = int(wanted.get("top_k") or 0), float(wanted.get("top_p") or 0.0)
            sampling = replace(sampling, top_k=top_k, top_p=top_p)
        else:
            sampling = GREEDY
        return wanted, GenerationSettings(maximum_tokens=wanted["max_gen_toks"], sampling=sampling)
    except (UserError, ValueError, TypeError, OverflowError) as error:
        raise UserError(f"eval_tasks: generation_kwargs of a task: {error}") from None
