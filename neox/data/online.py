"""Completions that a server samples and rates while training goes on.

The exchange is one line each way, in JSON and never anything that could run as code:

    to the server    "train"                                          the split, as a JSON string
    from the server  [{"prefix": [int...], "completions": [[int...]...], "rewards": [number...]}...]

after which the connection is closed.
"""

import json
import math
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neox.data.completions import LARGEST_REWARD
from neox.data.gpt_dataset import IGNORED_LABEL, PADDING_TOKEN, Sample
from neox.errors import DataError

CONNECT_SECONDS = 60.0
ANSWER_SECONDS = 1800.0
"""A server may sample only when it is asked."""

LARGEST_ANSWER = 2**28
"""Bytes; a line that does not end is no reason to fill the memory."""

REMEMBERED_PROMPTS = 100
"""Prompts whose mean rewards make up the baseline."""


@dataclass(frozen=True)
class RatedPrompt:
    """A prompt, what a sampler made of it, and what that is worth.

    Attributes:
        prefix: token ids of the prompt.
        completions: token ids of each completion.
        rewards: of each completion.
    """

    prefix: list[int]
    completions: list[list[int]]
    rewards: list[float]


def ask(host: str, port: int, split: str, vocabulary: int) -> list[RatedPrompt]:
    """Ask a server for samples.

    Args:
        host: name or address of the server.
        port: of the server.
        split: "train", "valid" or "test".
        vocabulary: token ids are below it.

    Raises:
        DataError: no server answers, or its answer is not of the form above.
    """
    place = f"server of completions {host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(json.dumps(split).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline(LARGEST_ANSWER)
    except OSError as error:
        raise DataError(
            f"{place}: {error.strerror or error}; start it, or mend online_dataserver_ips and online_dataserver_ports"
        ) from None
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{place}: expected one line of JSON, got {line[:60]!r}") from None
    if not isinstance(answer, list) or not answer:
        raise DataError(f"{place}: expected a list of samples, got {line[:60]!r}")
    return [_checked(sample, vocabulary, f"{place}: sample {number}") for number, sample in enumerate(answer)]


def _checked(sample: Any, vocabulary: int, place: str) -> RatedPrompt:
    if not isinstance(sample, dict) or not {"prefix", "completions", "rewards"} <= sample.keys():
        raise DataError(f"{place}: expected prefix, completions and rewards, got {str(sample)[:60]}")
    prefix, completions, rewards = sample["prefix"], sample["completions"], sample["rewards"]
    if not (isinstance(completions, list) and isinstance(rewards, list) and len(completions) == len(rewards) > 0):
        raise DataError(f"{place}: expected as many rewards as completions, and at least one")
    for tokens in (prefix, *completions):
        if not (isinstance(tokens, list) and all(type(t) is int and 0 <= t < vocabulary for t in tokens)):
            raise DataError(f"{place}: expected lists of token ids from 0 to {vocabulary - 1}, got {str(tokens)[:60]}")
    if not all(completions):
        raise DataError(f"{place}: a completion is empty; leave it out, or give it the end-of-document token")
    if not all(type(r) in (int, float) and abs(r) <= LARGEST_REWARD for r in rewards):
        raise DataError(f"{place}: expected finite numbers for rewards, got {str(rewards)[:60]}")
    return RatedPrompt(prefix, completions, [float(reward) for reward in rewards])


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward less the mean of the others (Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!").

    Args:
        rewards: of the completions of one prompt, at least two.
    """
    total, others = math.fsum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


class OnlineDataset:
    """Completions of a server, as they come.

    A sample is {"tokens", "labels": int64 [S + 1], "rewards", "raw_rewards": float32 []}: the prompt has no labels;
    `rewards` are less a baseline, `raw_rewards` are not.

    Args:
        server: host and port.
        split: what to ask for.
        seq_length: S; what is longer than S + 1 is cut.
        vocabulary: token ids are below it.
        leaves_one_out: the baseline of a completion is the mean reward of the others of its prompt; else the mean of
            the mean rewards of the prompts before, the last 100 at most.
    """

    def __init__(
        self, server: tuple[str, int], split: str, *, seq_length: int, vocabulary: int, leaves_one_out: bool
    ) -> None:
        self.server, self.split = server, split
        self.seq_length, self.vocabulary = seq_length, vocabulary
        self.leaves_one_out = leaves_one_out
        self._samples: deque[Sample] = deque()
        self._means: deque[float] = deque(maxlen=REMEMBERED_PROMPTS)

    def take(self, count: int) -> list[Sample]:
        """The next `count` samples; the server is asked whenever there is none left.

        Raises:
            DataError: see `ask`, or a prompt is too long, or has too few completions for its baseline.
        """
        while len(self._samples) < count:
            for prompt in ask(*self.server, self.split, self.vocabulary):
                self._samples.extend(self._samples_of(prompt))
        return [self._samples.popleft() for _ in range(count)]

    def _samples_of(self, prompt: RatedPrompt) -> list[Sample]:
        if len(prompt.prefix) > self.seq_length:
            raise DataError(
                f"server of completions {self.server[0]}:{self.server[1]}: a prompt of {len(prompt.prefix)} tokens "
                f"leaves no room for a completion in seq_length {self.seq_length}; shorten it"
            )
        advantages = self._advantages(prompt.rewards)
        return [
            self._sample(prompt.prefix, *row)
            for row in zip(prompt.completions, advantages, prompt.rewards, strict=True)
        ]

    def _advantages(self, rewards: list[float]) -> list[float]:
        if self.leaves_one_out:
            if len(rewards) < 2:
                raise DataError(
                    f"server of completions {self.server[0]}:{self.server[1]}: reinforce_leave_one_out compares the "
                    "completions of a prompt, and one has a single completion; sample at least two"
                )
            return leave_one_out(rewards)
        baseline = float(np.mean(self._means)) if self._means else 0.0
        self._means.append(float(np.mean(rewards)))
        return [reward - baseline for reward in rewards]

    def _sample(self, prefix: list[int], completion: list[int], advantage: float, reward: float) -> Sample:
        length = self.seq_length + 1
        row, labels = (prefix + completion)[:length], ([IGNORED_LABEL] * len(prefix) + completion)[:length]
        missing = length - len(row)
        return {
            "tokens": np.array(row + [PADDING_TOKEN] * missing, np.int64),
            "labels": np.array(labels + [IGNORED_LABEL] * missing, np.int64),
            "rewards": np.array(advantage, np.float32),
            "raw_rewards": np.array(reward, np.float32),
        }
