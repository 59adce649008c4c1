"""Which settings look like secrets. A config is copied into run folders and trackers, so it must hold none."""

import re
from collections.abc import Iterator
from typing import Any

SECRET_ADVICE = "looks like a secret, and settings are copied into run folders; put it in env FDFO_REWARD_KEY"

_SECRET_KEY = re.compile(
    r"(^|_)((api|auth|access|secret|private|reward)_?key|passw(or)?d|passphrase|secret|credentials?|authorization|bearer)$"
    r"|^key$|^((api|auth|access|bearer|refresh|hf|hub)_?)?token$",
)
_TOKEN = (
    r"(?:[spr]k[-_](?=[\w-]*\d)\w[\w-]{5,}|(?:hf|gh[opsur])_(?=[a-z]*\d)[a-z0-9]{8,}"
    r"|(?:github_pat_|glpat-|xox[abeprs]-)[\w-]{8,}"
    r"|AKIA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{8,}\.[\w-]+\.[\w-]+"
    r"|Bearer\s+(?=\S*\d)\S{12,})"
)
"""Keys as OpenAI, Stripe, Hugging Face, GitHub, GitLab, Slack, AWS and Google make them, and JSON web tokens."""

_PASSWORD = r"(?:https?://[^/\s]*@|[a-z][a-z0-9+.-]*://[^/\s]*:[^/\s]*@)"
_SECRET_VALUE = re.compile(rf"(?:^|[\s\"'`=(\[{{,])(?:{_TOKEN}|{_PASSWORD})|^[=\s]*Bearer\s", re.IGNORECASE)
_SHOWN_SECRET = re.compile(rf"\S*?\b{_TOKEN}\S*|\S*://\S*@", re.IGNORECASE)
_QUERY_KEY = re.compile(r"[?&]([\w-]+)=")


def is_secret_key(key: str) -> bool:
    """Whether a setting of this name would hold a secret (`api_key`, `X-Api-Key`, `apiKey`, `token`, `password`)."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).replace("-", "_").strip("_")
    return _SECRET_KEY.search(words.lower()) is not None


def is_secret_value(value: object) -> bool:
    """Whether a text has the form of a key (`sk-...`, `hf_...`) or is a URL with a password or a key in it."""
    if not isinstance(value, str):
        return False
    has_key = "://" in value and any(is_secret_key(name) for name in _QUERY_KEY.findall(value))
    return has_key or _SECRET_VALUE.search(value) is not None


def secret_keys(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys under `tree` (mappings and lists) that look like secrets."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        name = f"{prefix}.{key}" if prefix else str(key)
        if is_secret_key(str(key)) or is_secret_value(key) or is_secret_value(value):
            yield name
        else:
            yield from secret_keys(value, name)


def redacted(line: str) -> str:
    """A line of a broken file, fit to be shown: what follows a secret's key is left out."""
    for match in re.finditer(r"""["']?([\w-]+)["']?\s*[:=\s]""", line):
        if is_secret_key(match.group(1)):
            return line[: match.end()] + " ***"
    return without_secrets(line)


def without_secrets(text: str) -> str:
    """A text, fit to be shown: words that have the form of a secret are left out."""
    for match in _QUERY_KEY.finditer(text):
        if is_secret_key(match.group(1)):
            return without_secrets(text[: match.start()]) + "***"
    return _SHOWN_SECRET.sub("***", text)
