"""Keys of servers come from the environment; what a server or a library echoes of them is shown nowhere."""

from __future__ import annotations

import os

_LEAST_LENGTH = 6
"""Shorter ones are no secrets, and would be found in any text."""


def masked(text: str) -> str:
    """`text` without the values of environment variables that hold secrets by their names, such as FDFO_REWARD_KEY."""
    from fdfo_engine.config.secret_keys import is_secret_key  # not before: a process looks who started it first

    secrets = [value for name, value in os.environ.items() if len(value) >= _LEAST_LENGTH and is_secret_key(name)]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
