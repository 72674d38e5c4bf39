"""The interface that gloo is told to use."""

import ipaddress
import logging

import pytest

from infer.launch import RankEnv
from infer.parallel import interfaces
from infer.parallel.interfaces import VARIABLE, choose

TWO_HOSTS = RankEnv(rank=2, world_size=4, local_world_size=2, master_addr="node0", master_port=29500)


@pytest.fixture
def told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("infer"), "propagate", True)
    caplog.set_level(logging.INFO)
    return caplog


def leads(monkeypatch, address: str | None, name: str | None) -> None:
    found = address and ipaddress.ip_address(address)
    monkeypatch.setattr(interfaces, "_address_towards", lambda host, port: found)
    monkeypatch.setattr(interfaces, "_interface_of", lambda address: name)


def test_the_interface_that_leads_to_the_master_is_taken(told, monkeypatch):
    leads(monkeypatch, "10.1.2.3", "eth7")
    environ: dict[str, str] = {}
    choose(TWO_HOSTS, environ)
    assert environ == {VARIABLE: "eth7"}
    assert told.messages == ["gloo uses the interface eth7 (10.1.2.3), which leads to node0"]


@pytest.mark.parametrize(
    ("env", "environ"),
    [(RankEnv(world_size=4, local_world_size=4, master_addr="node0"), {}), (TWO_HOSTS, {VARIABLE: "ib0"})],
)
def test_on_one_host_and_against_the_user_s_word_nothing_is_chosen(told, monkeypatch, env, environ):
    leads(monkeypatch, "10.1.2.3", "eth7")
    before = dict(environ)
    choose(env, environ)
    assert environ == before and not told.messages


@pytest.mark.parametrize(("address", "name"), [("127.0.1.1", "lo"), ("10.1.2.3", None), (None, None)])
def test_a_way_that_ends_on_this_host_is_warned_of(told, monkeypatch, address, name):
    leads(monkeypatch, address, name)
    environ: dict[str, str] = {}
    choose(TWO_HOSTS, environ)
    (message,) = told.messages
    assert not environ and f"(to the master address node0 it uses {address})" in message
    assert f"set {VARIABLE} to the one between" in message


def test_this_host_s_own_addresses():
    assert interfaces._interface_of(ipaddress.ip_address("127.0.0.1")) == "lo"
    assert interfaces._interface_of(ipaddress.ip_address("203.0.113.9")) is None
    assert str(interfaces._address_towards("127.0.0.1", 29500)) == "127.0.0.1"
