"""Where the ranks of one host meet: on its loopback interface, so that no other host can."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from train.common.errors import PeerLostError
from train.distributed.launch import free_port, loopback_store

LISTENS = "0A"  # in /proc/net/tcp (include/net/tcp_states.h)


def addresses(port: int) -> set[str]:
    """The addresses at which something listens to this port, in hexadecimal, as the kernel says."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables for row in table]
    return {row[1].split(":")[0] for row in rows if row[3] == LISTENS and row[1].endswith(f":{port:04X}")}


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free port, at which a single rank is to meet itself."""
    port = free_port()
    ranks = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **ranks}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)  # whatever other tests have done in this process
    return port


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_store_listens_on_loopback_alone(host: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", host)
    store = loopback_store(10.0)
    assert store is not None
    assert addresses(port) == {"0100007F"}
    other = TCPStore(host, port, is_master=False)
    store.set("key", "value")
    assert other.get("key") == b"value"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MASTER_ADDR", "10.0.0.1"),
        ("MASTER_ADDR", "node1"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("WORLD_SIZE", "2"),  # the other may be elsewhere, as where Kubeflow gives the first the address localhost
    ],
)
def test_where_others_may_come_or_an_agent_has_made_it_the_store_is_left_to_torch(
    name: str, value: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert loopback_store(10.0) is None
    assert not addresses(port)


def test_a_port_that_is_taken_is_named(port: int) -> None:
    said = f"rank 0 can't listen at 127.0.0.1:{port}.*: Address already in use"
    with socket.create_server(("127.0.0.1", port)), pytest.raises(PeerLostError, match=said):
        loopback_store(10.0)
