"""Fake reward servers, and clients that do not wait."""

import pytest
from rewards.fake_server import FakeServer

from fdfo_engine.rewards import json_server


@pytest.fixture
def serve():
    servers = []

    def start(answer, port=0):
        servers.append(FakeServer(answer, port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def brisk(monkeypatch):
    """Retries at once, so that a test need not wait."""
    monkeypatch.setattr(json_server, "_LONGEST_WAIT_S", 0.02)
