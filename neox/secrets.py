"""Keeping passwords and keys out of what is written down."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

MASK = "***"

_NAMES = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASS|_PWD|PWD_|_PW(?![A-Z])|CRED|AUTH|BEARER|COOKIE|PRIVATE|SIGNATURE|HOOK|"
    r"CONNECTION_STR|_SAS(?![A-Z])|(?<![A-Z])(?:DSN|PAT)(?![A-Z])|JWT",
    re.IGNORECASE,
)
"""Names of variables whose values are not shown. It is better to hide a value too many."""

# The length before the word is bounded: a text that is one long word is searched from each of its letters on.
_NAMED = (
    r"(?:[\w-]{0,60}"
    r"(?:(?:api|access|auth|private|secret|wandb|comet|hf|account)[_-]?(?:key|token)|passw(?:or)?d|secret)|"
    r"(?<![\w-])token|(?<=--)token)"
)

_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"',}]+)"""

Replacement = str | Callable[[re.Match[str]], str]


def _quoted(match: re.Match[str]) -> str:
    """What stands for a value behind its name, in quotes as YAML needs them."""
    name, value = match[1], match[2]
    quote = value[0] if value[0] in "\"'" else "'" if name.rstrip().endswith(":") else ""
    return f"{name}{quote}{MASK}{quote}"


_IS_NAMED = re.compile(_NAMED, re.IGNORECASE)

_IN_ADDRESSES: tuple[tuple[re.Pattern[str], Replacement], ...] = (
    # https://user:password@host, https://token@host; passwords may have a / or @ of their own
    (re.compile(r"(?<=://)(?:[^\s/@:'\"]*:[^\s'\"?#]+|[^\s/@'\"]+)(?=@)"), MASK),
    # ?token=..., &X-Amz-Signature=...
    (re.compile(r"(?<=[?&])([\w.-]*(?:key|token|secret|pass|sig|auth|cred)[\w.-]*)=[^\s&'\"]+", re.I), rf"\1={MASK}"),
    (re.compile(r"(?<=hooks\.slack\.com/services/)[\w/]+"), MASK),
)

_IN_TEXT: tuple[tuple[re.Pattern[str], Replacement], ...] = (
    *_IN_ADDRESSES,
    # wandb_api_key=..., "password": "..."
    (re.compile(rf"""({_NAMED}["']?\s*[=:]\s*)({_VALUE})""", re.I), _quoted),
    # --api-key ...
    (re.compile(rf"(--{_NAMED}\s+){_VALUE}", re.I), rf"\1{MASK}"),
    # Authorization: Bearer ...
    (re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}"), rf"\1{MASK}"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.S), MASK),
    # what Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS and Google hand out, and JSON web tokens
    (
        re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|AIza|eyJ)[A-Za-z0-9_\-.]{12,}"),
        MASK,
    ),
)


def masked_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables by name; what looks like a secret by its name or its form is masked."""
    return {
        name: MASK if _NAMES.search(name) and value else masked_text(value) for name, value in sorted(environ.items())
    }


def masked_text(text: str) -> str:
    """A text in which passwords of addresses, values named as secrets, and well-known kinds of keys are masked."""
    return _replaced(text, _IN_TEXT)


def masked_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, in which passwords of addresses and values named as secrets are masked, and nothing else.

    What only has the form of a key stays: it may be a path, and the settings are to be used again.
    """
    return {
        name: MASK if _IS_NAMED.fullmatch(str(name)) and value else _masked(value) for name, value in values.items()
    }


def _masked(value: Any) -> Any:
    if isinstance(value, Mapping):
        return masked_values(value)
    if isinstance(value, list | tuple):
        return [_masked(one) for one in value]
    return _replaced(value, _IN_ADDRESSES) if isinstance(value, str) else value


def _replaced(text: str, patterns: Iterable[tuple[re.Pattern[str], Replacement]]) -> str:
    for pattern, replacement in patterns:
        text = pattern.sub(replacement, text)
    return text
