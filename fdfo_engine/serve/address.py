"""Where an HTTP side listens: its address, the names it answers to, its socket. The server's, and the label page's."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

ADDRESS_NAME = "serve.json"
"""File of the run folder that says where its server is."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_ANY_HOSTS = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Attributes:
        host, port: the address; port 0 takes a free one.
        allow_remote: whether an address that other machines reach may be taken.
        hosts: further names it answers to.
    """

    host: str = "127.0.0.1"
    port: int = 0
    allow_remote: bool = False
    hosts: Sequence[str] = ()

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches it."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def names(self) -> list[str]:
        """Every name it answers to."""
        own = [] if self.host in _ANY_HOSTS else [self.host]
        return [*LOOPBACK_HOSTS, *own, *self.hosts]

    def require_allowed(self) -> None:
        """Refuses what would open it to strangers unasked.

        Raises:
            UsageError: an address that is not this machine's alone.
        """
        if not self.is_loopback and not self.allow_remote:
            raise UsageError(
                f"--host {self.host}: other machines would reach it; leave it out and use `{self.tunnel(self.port)}`, "
                "or --allow-remote"
            )

    def tunnel(self, port: int) -> str:
        """The command that brings `port` of this machine to another one."""
        return f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}"

    def url(self, port: int) -> str:
        """Where a client of this machine finds it at `port`."""
        return f"http://{self.host if self.is_loopback else '127.0.0.1'}:{port}"

    @contextmanager
    def bound(self) -> Iterator[socket.socket]:
        """A socket that listens there.

        Raises:
            EnvironmentProblem: the address is taken, or is not this machine's.
        """
        listener = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else a body waits 40 ms for its head's receipt
        with listener:
            try:
                listener.bind((self.host, self.port))
                listener.listen(128)
            except OSError as error:
                hint = "choose another --port, or 0 for a free one"
                text = f"cannot listen at {self.host}:{self.port}: {error.strerror}; {hint}"
                raise EnvironmentProblem(text) from error
            yield listener
