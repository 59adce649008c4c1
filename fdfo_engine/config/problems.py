"""The one error of a config: every problem at once, each with where it is."""

from collections.abc import Sequence
from typing import ClassVar

from fdfo_engine.config.secret_keys import without_secrets


class ConfigError(Exception):
    """Settings that cannot be used; the process exits with `exit_code`.

    Attributes:
        problems: a text each; words that have the form of a secret are left out.
    """

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(map(without_secrets, problems))
        lines = [problem.replace("\n", "\n  ") for problem in self.problems]
        super().__init__(
            lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems in the settings:", *lines])
        )
