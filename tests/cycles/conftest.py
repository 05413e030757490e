"""A fresh tenant for each test, on the one server that run.sh started."""

import socket

import pytest
from runcycles import CyclesClient
from support import Proxy, new_tenant


@pytest.fixture
def journal(tmp_path):
    """Where the SDK keeps what it has not yet settled: not in anybody's home."""
    return tmp_path / "journal"


@pytest.fixture
def tenant(journal):
    return new_tenant(journal)


@pytest.fixture
def client(tenant):
    with CyclesClient(tenant.config()) as client:
        yield client


@pytest.fixture
def proxy():
    proxy = Proxy()
    yield proxy
    proxy.server.shutdown()
    proxy.server.server_close()


@pytest.fixture
def down(tenant):
    """Settings of a client whose server is not there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return tenant.config(f"http://127.0.0.1:{port}", retry_enabled=False)
