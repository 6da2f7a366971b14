import socket
import subprocess
import sys

import psutil
import pytest
import torch.distributed

from mini_r1 import InputError, RunFailed
from mini_r1.launch import network
from mini_r1.launch.network import (
    LOOPBACK,
    address_towards,
    interface_of,
    listens,
    reserve_port,
    resolve,
)


@pytest.fixture(autouse=True)
def chosen_by_nobody(monkeypatch):
    for variable in network.INTERFACE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_a_reserved_port_is_nobody_elses_and_ours_to_listen_at():
    port = reserve_port()
    with pytest.raises(OSError, match="in use"):
        socket.socket().bind((LOOPBACK, port))
    # Another process looking for one, as a second job on this node does.
    code = f"from mini_r1.launch.network import reserve_port; print(reserve_port({port}))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert int(other.stdout) > port
    # What listens there in the end: the store of torch's launcher, and TRL's for the weights.
    store = torch.distributed.TCPStore(LOOPBACK, port, world_size=1, is_master=True)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_that_there_is_no_port_left_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(network, "PORTS_TRIED", 1)
    port = reserve_port()
    with pytest.raises(RunFailed, match=f"no port from {port} to {port} is free"):
        reserve_port(port)


def test_who_listens_at_a_port_can_be_seen_from_elsewhere(listening):
    assert listens(LOOPBACK, int(listening.rpartition(":")[2]))
    assert not listens(LOOPBACK, reserve_port())


def test_a_name_without_an_address_is_told():
    assert resolve("127.0.0.1") == LOOPBACK
    with pytest.raises(InputError, match=r"no\.such\.node\.invalid: its name has no address here"):
        resolve("no.such.node.invalid")


def test_the_address_is_that_of_the_way_to_the_others(monkeypatch):
    assert address_towards("127.0.0.2") == LOOPBACK
    # What follows ^ is excluded, not chosen.
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^docker")
    assert address_towards("127.0.0.2") == LOOPBACK
    with pytest.raises(InputError, match="no way leads there from"):
        address_towards("255.255.255.255")


def test_the_network_of_the_sites_choice_is_taken(monkeypatch):
    addresses = {"eth0": "10.0.0.1", "ib0": "10.1.0.1", "ib1": "10.2.0.1"}
    found = {name: [FakeEntry(address)] for name, address in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    for variable, chosen, address in (
        ("NCCL_SOCKET_IFNAME", "ib", "10.1.0.1"),
        ("NCCL_SOCKET_IFNAME", "=ib1", "10.2.0.1"),
        ("NCCL_SOCKET_IFNAME", "eno,eth", "10.0.0.1"),
        ("GLOO_SOCKET_IFNAME", "eth0", "10.0.0.1"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(variable, chosen)
            assert address_towards("127.0.0.2") == address
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib")  # gloo knows no prefixes
    wrong = r"GLOO_SOCKET_IFNAME: 'ib' names no interface of .*; it has eth0, ib0, ib1"
    with pytest.raises(InputError, match=wrong):
        address_towards("127.0.0.2")
    assert interface_of("10.2.0.1") == "ib1"


class FakeEntry:
    family = socket.AF_INET

    def __init__(self, address):
        self.address = address
