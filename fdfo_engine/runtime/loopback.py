"""The loopback interface, over which the ranks of one machine talk, and a single one to itself."""

from __future__ import annotations

import socket

from fdfo_engine.runtime.errors import EnvironmentProblem

_WITHIN_S = 5.0


def require_loopback() -> None:
    """Sees whether this machine reaches itself: a container without a network may not.

    Raises:
        EnvironmentProblem: it does not; libraries would wait for minutes, and say something else.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_WITHIN_S).close()
    except OSError as error:
        raise EnvironmentProblem(
            f"this machine does not reach itself at 127.0.0.1 ({error.strerror or error}): "
            "bring its loopback interface up: ip link set lo up"
        ) from error
