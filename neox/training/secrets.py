"""Keeping passwords and keys out of what is written down."""

import re
from collections.abc import Mapping

MASK = "***"

_NAMES = re.compile(
    r"KEY|TOKEN(?!IZER)|SECRET|PASS|_PWD|PWD_|CREDENTIAL|AUTH|COOKIE|PRIVATE|SIGNATURE|HOOK|CONNECTION_STR|"
    r"_SAS(?![A-Z])|(?<![A-Z])DSN(?![A-Z])|JWT",
    re.IGNORECASE,
)
"""Names of variables whose values are not shown. It is better to hide a value too many."""

_NAMED = r"[\w-]*(?:(?:api|access|auth|private|secret|wandb|comet|hf|account)[_-]?(?:key|token)|passw(?:or)?d|secret)"

_IN_TEXT = (
    # https://user:password@host, https://token@host
    (re.compile(r"(?<=://)[^\s/@'\"]+(?=@)"), MASK),
    # ?token=..., &X-Amz-Signature=...
    (re.compile(r"(?<=[?&])([\w.-]*(?:key|token|secret|pass|sig|auth|cred)[\w.-]*)=[^\s&'\"]+", re.I), rf"\1={MASK}"),
    # wandb_api_key=..., "password": "..."
    (re.compile(rf"""({_NAMED}["']?\s*[=:]\s*)(?:"[^"]*"|'[^']*'|[^\s"',}}]+)""", re.I), rf"\1{MASK}"),
    # --api-key ...
    (re.compile(rf"(--{_NAMED}\s+)\S+", re.I), rf"\1{MASK}"),
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
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text
