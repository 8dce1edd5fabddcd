"""What a choice of address means to libraries: which variables, set by whom, and what is said of a difference."""

from __future__ import annotations

import logging

import pytest

from tensorway import _logging, settings
from tensorway.rendezvous import fabrics
from tensorway.rendezvous.hosts import HostChoice

CHOICE = HostChoice("0.0.0.0", "gateway", "any, iface:ib0", "ib0", "10.78.0.2")


@pytest.fixture
def unset(monkeypatch):
    """None of the variables is set, and what a test sets is gone after it."""
    for name in fabrics.variables(CHOICE):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    _logging.forget()


@pytest.fixture
def sysfs(tmp_path):
    (tmp_path / "ib0" / "device" / "infiniband" / "mlx5_0").mkdir(parents=True)
    return tmp_path


def test_one_choice_feeds_everything(sysfs):
    address = dict.fromkeys(
        [
            "VLLM_HOST_IP",
            "VLLM_NIXL_SIDE_CHANNEL_HOST",
            "VLLM_P2P_SIDE_CHANNEL_HOST",
            "VLLM_EC_SIDE_CHANNEL_HOST",
            "MOONCAKE_REQUESTER_LOCAL_HOSTNAME",
            "MC_TCP_BIND_ADDRESS",
        ],
        "10.78.0.2",
    )
    interface = {"UCX_NET_DEVICES": "mlx5_0:1,ib0", "NCCL_SOCKET_IFNAME": "=ib0", "GLOO_SOCKET_IFNAME": "ib0"}
    assert {**address, **interface} == fabrics.variables(CHOICE, sysfs)
    assert "ib0" == fabrics.variables(CHOICE, sysfs / "none")["UCX_NET_DEVICES"]


def test_what_the_user_left_unset_or_blank_is_set_for_this_process(unset, sysfs, monkeypatch):
    monkeypatch.setenv("VLLM_HOST_IP", " ")
    assert fabrics.variables(CHOICE, sysfs) == fabrics.apply(CHOICE, sysfs)
    assert ("10.78.0.2", "=ib0") == (settings.get("VLLM_HOST_IP"), settings.get("NCCL_SOCKET_IFNAME"))
    assert {} == fabrics.apply(CHOICE, sysfs)


@pytest.mark.parametrize(
    ("name", "value"),
    [("UCX_NET_DEVICES", "mlx5_0:1"), ("UCX_NET_DEVICES", "ib0,mlx5_0:1"), ("NCCL_SOCKET_IFNAME", "ib0")],
)
def test_what_the_user_set_alike_stays_and_nothing_is_said(unset, sysfs, monkeypatch, caplog, name, value):
    monkeypatch.setenv(name, value)
    assert name not in fabrics.apply(CHOICE, sysfs)
    assert (value, []) == (settings.get(name), caplog.records)


def test_what_the_user_set_otherwise_wins_and_is_said_once_with_both(unset, sysfs, monkeypatch, caplog):
    monkeypatch.setenv("UCX_NET_DEVICES", "eth1")
    for _ in range(3):
        assert "UCX_NET_DEVICES" not in fabrics.left_unset(CHOICE, sysfs=sysfs)
    (said,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert said.getMessage() == (
        "UCX_NET_DEVICES=eth1 is set, and wins over the host policy any, iface:ib0, which gives mlx5_0:1,ib0; "
        "unset it, or choose by one of them"
    )
    assert "eth1" == settings.get("UCX_NET_DEVICES")


def test_who_asks_for_one_variable_hears_of_no_other(unset, sysfs, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_HOST_IP", "10.0.0.1")
    assert {"UCX_NET_DEVICES": "mlx5_0:1,ib0"} == fabrics.left_unset(CHOICE, ["UCX_NET_DEVICES"], sysfs)
    assert [] == caplog.records
