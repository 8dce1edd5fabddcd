from __future__ import annotations

from tensorway.hookspecs import API
from tensorway.testing import OfferSuite
from tensorway.types import HookContext
from tensorway_etcd.offers import rendezvous
from tensorway_etcd.store import EtcdStore


class TestOffer(OfferSuite):
    kind = "rendezvous"
    name = "etcd"
    native_modules = ("etcd3", "grpc")


def test_the_offer_promises_what_the_store_can_do():
    offer = rendezvous(HookContext(api=API, core_version="0"))

    assert offer.factory is not None
    assert EtcdStore.abilities == offer.capabilities


def test_the_probe_asks_no_server(probed):
    answer = probed()

    assert (None, "usable", []) == (answer["code"], answer["state"], answer["lines"])
    assert answer["reason"].startswith("HTTP of Python 3.")


def test_a_python_without_tls_is_a_record(probed, tmp_path):
    (tmp_path / "ssl.py").write_text("raise ImportError('No module named _ssl')")

    answer = probed(tmp_path)

    assert "this Python was built without TLS (No module named _ssl)" == answer["reason"]
    assert "Install a Python with ssl." == answer["remedy"]
