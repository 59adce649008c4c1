"""The sockets of server and page."""

import socket

import pytest

from fdfo_engine.label import server as label_server
from fdfo_engine.serve import server as serve_server


@pytest.mark.parametrize(
    "bound",
    [
        lambda: serve_server.Door(port=0).bound(),
        lambda: label_server.PageDoor(port=0).bound(),
    ],
    ids=["server", "page"],
)
def test_what_is_written_leaves_at_once(bound):
    """Head and body of an answer are two writes: without it, the second waits until the first is acknowledged."""
    with bound() as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0
