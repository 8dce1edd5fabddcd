"""The kit's suite for offers, over every backend that is installed here, ours and others'."""

from __future__ import annotations

import pytest

from tensorway.plugins.scan import scan
from tensorway.testing import OfferSuite

#: What importing a plugin must not bring, beside torch and numpy.
NATIVE = ("nixl", "nixl_cu12", "nixl_cu13", "nixl_rocm", "rixl", "nvidia", "mooncake", "ray", "redis", "vllm")

INSTALLED = [(row.kind, row.name) for row in scan().declarations]


@pytest.mark.parametrize(("kind", "name"), INSTALLED, ids=[f"{kind}-{name}" for kind, name in INSTALLED])
class TestEveryBackend(OfferSuite):
    """One class, parametrized: a backend that is installed and fails its suite fails here."""

    native_modules = NATIVE

    @pytest.fixture(autouse=True)
    def _which(self, kind: str, name: str) -> None:
        self.kind, self.name = kind, name


def test_our_own_backends_are_among_them():
    expected = {("transport", "mooncake"), ("transport", "nixl"), ("transport", "rixl"), ("offloading", "cpu")}
    expected |= {("eplb_communicator", "gloo"), ("eplb_communicator", "nccl")}
    expected |= {("rendezvous", name) for name in ("direct", "etcd", "ray", "redis", "tcpstore")}
    expected |= {("platform", name) for name in ("cpu", "cuda", "rocm", "xpu")}
    assert expected <= set(INSTALLED)
