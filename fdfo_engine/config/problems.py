"""The one error of a config: every problem at once, each with where it is."""

from collections.abc import Sequence
from typing import ClassVar


class ConfigError(Exception):
    """Settings that cannot be used. `problems` has one text each; the process exits with `exit_code`."""

    exit_code: ClassVar[int] = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = [problem.replace("\n", "\n  ") for problem in self.problems]
        super().__init__(
            lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems in the settings:", *lines])
        )
