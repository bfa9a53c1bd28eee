"""Secrets that stand in a configuration or a line of text, masked before anything is recorded, logged or sent.

>>> masked("https://me:pa55@host/x api_key=abc hf_" + "a" * 30)
'https://***@host/x api_key=*** ***'
>>> masked({"token": "abc", "text_tokens": 8192, "names": ["https://me@host"]})
{'token': '***', 'text_tokens': 8192, 'names': ['https://***@host']}
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
NAME = r"(?:[\w.-]*[_.-])?(?:token|secret|password|passwd|passphrase|credentials?|api_?key|access_?key|secret_?key|private_?key)"
"""What a setting that holds a secret is called; counts of tokens are called otherwise."""
FORMS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"), MASK),  # the user and password of a URL
    (re.compile(rf"(?i)(?<![\w.-])({NAME}['\"]?\s*[=:]\s*['\"]?)(?!null\b|None\b)[^\s'\",;&}})]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{12,}"), rf"\1 {MASK}"),
    (re.compile(r"\b(?:hf_|api_org_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abpr]-|AIza)[\w-]{16,}"), MASK),
    (re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), MASK),
)
"""Known forms of secrets in a text: Hugging Face, OpenAI and its like, GitHub, GitLab, Slack, Google, AWS."""


def masked(value: Any) -> Any:
    """The same nested values or text without secrets; masking twice changes nothing."""
    if isinstance(value, Mapping):
        return {key: MASK if inner and _is_secret(key, inner) else masked(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(masked(inner) for inner in value)
    if isinstance(value, str):
        for form, instead in FORMS:
            value = form.sub(instead, value)
    return value


def _is_secret(key: object, value: object) -> bool:
    return isinstance(value, (str, int)) and re.fullmatch(f"(?i){NAME}", str(key)) is not None


def masking(record: logging.LogRecord) -> bool:
    """A filter for handlers of logs: takes secrets out of every line."""
    record.msg, record.args = masked(record.getMessage()), ()
    return True
