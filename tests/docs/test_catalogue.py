"""The error catalogue says what the code says: every class and every code has a section with a message that is real.

Each message on the page is produced here and compared word for word.
"""

from __future__ import annotations

import ast
import errno
import inspect
import re
import socket
import threading
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import tensorway
from tensorway import cli, errors, plugins
from tensorway.cli import new_plugin
from tensorway.eplb import ExpertLayout, Group, Staging
from tensorway.memory import Region
from tensorway.plugins import scan, slots
from tensorway.rendezvous.hosts import Address, choose
from tensorway.rendezvous.negotiation import Fact, agree
from tensorway.settings import from_environment
from tensorway.transport import BlockTable, Endpoint
from tensorway.transport.local import LocalFabric
from tensorway_eplb.membership import Membership
from tensorway_eplb.placement import Placement
from tensorway_eplb.plan import TransferPlan
from tensorway_eplb.policy import Topology
from tensorway_kv import tickets

CLASSES = {name: cls for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}
PLUGINS = Path(scan.__file__).parent
#: Words in the sources that look like codes and are something else.
NO_CODES = {
    "in-process": "the dist of an offer that was registered in this process",
    "tensorway-probe": "the name of a thread",
}

MISSING = 'return ProbeResult.failed("NIXL cannot be loaded: nixl_cu12 is not installed", "pip install nixl-cu12")'
WORKS = 'return ProbeResult.passed("it works")'
OFFER = 'return Offer("acme", "transport", "A test.", probe=probe, factory=Backend, options=Options)'


def broken(site, old, new):
    """A dist whose module differs in one place from one that works."""
    source = inspect.getmodule(type(site)).GOOD
    assert old in source
    site.dist()
    site.module(source.replace(old, new))
    return site.host(probe_timeout=10)


# -- errors, each as whoever made the mistake gets it


def backend_not_found(site, capsys):
    site.dist(entries="[tensorway.transport]\nnixl = acme:transport")
    site.host().create("transport", "nixle")


def backend_conflict(site, capsys):
    for dist in ("acme", "zeta"):
        site.dist(dist)
    site.module()
    site.host().create("transport", "acme")


def backend_unavailable(site, capsys):
    broken(site, WORKS, MISSING).create("transport", "acme")


def plugin_defect(site, capsys):
    site.dist()
    site.module("raise OSError('libacme.so.1: cannot open shared object file')")
    site.host(strict=True).create("transport", "acme")


def options_invalid(site, capsys):
    site.dist()
    site.module()
    site.host().create("transport", "acme", {"dedline": 5})


def setting_invalid(site, capsys):
    from_environment({"TENSORWAY_STRICT": "perhaps"})


def offer_invalid(site, capsys):
    plugins.register(None)


def host_busy(site, capsys):
    site.dist()
    slot, go = site.host().slots()[0], threading.Event()
    busy = threading.Thread(target=lambda: (slot.load_lock.acquire(), held.set(), go.wait(20)))
    held = threading.Event()
    busy.start()
    try:
        assert held.wait(20)
        slot.load(site.host().context, 0.5)
    finally:
        go.set()
        busy.join(20)


def new_plugin_refused(site, capsys):
    new_plugin.plan("nixl", "transport")


def tensorway_error(site, capsys):
    """The base class itself: what the command line makes of an exception that nobody expected."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_run", lambda arguments, out: 1 / 0)
        assert cli.main(["plugins", "list"]) == 70
    printed = capsys.readouterr().err.removesuffix("\n")
    raise errors.TensorwayError(*re.split("\n  ", printed.removeprefix("TensorwayError: ")))


BLOCK = 64 << 10


class Stuck(LocalFabric):
    """A fabric that takes every transfer and never ends one."""

    def post(self, *anything):
        return object()

    def done(self, job):
        return False

    settled = done


@contextmanager
def connected(fabric):
    """A reader over this fabric, and a route to a producer; both in this process."""
    with Endpoint(fabric, "decode-0") as reader, Endpoint(LocalFabric(), "prefill-0") as producer:
        there, here = producer.register(bytearray(8 * BLOCK)), reader.register(bytearray(8 * BLOCK))
        peer = reader.connect(producer.describe())
        local, remote = BlockTable.over(here.regions[0], BLOCK), BlockTable.over(there.regions[0], BLOCK)
        yield reader, producer, reader.prepare(peer, local, remote)
        reader.close(deadline=0)


def memory_invalid(site, capsys):
    with connected(LocalFabric()) as (reader, _, route):
        reader.read(route, [0], [8])


def description_invalid(site, capsys):
    with connected(LocalFabric()) as (reader, producer, _):
        data = bytearray(producer.describe())
        data[-1] ^= 1
        reader.connect(bytes(data))


def deadline_exceeded(site, capsys):
    with connected(Stuck()) as (reader, _, route):
        reader.read(route, [0], [0], deadline=0.05).wait()


def transfer_cancelled(site, capsys):
    with connected(Stuck()) as (reader, _, route):
        transfer = reader.read(route, [0], [0])
        transfer.cancel()
        transfer.wait()


def peer_lost(site, capsys):
    with connected(LocalFabric()) as (reader, producer, route):
        producer.close()
        reader.read(route, [0], [0]).wait()


def transfer_failed(site, capsys):
    # What the kernel answers under ptrace protection cannot be had as root; how it is told is the fabric's own code.
    raise LocalFabric()._failed("read", SimpleNamespace(name="prefill-0", pid=4711, lost=""), errno.EPERM)


def unsupported(site, capsys):
    with connected(LocalFabric()) as (reader, _, _route):
        reader.register(Region(0x7F0000000000, 1 << 20, "cuda:0"))


def closed(site, capsys):
    with connected(LocalFabric()) as (reader, _, _route):
        reader.close()
        reader.describe()


def address_invalid(site, capsys):
    known = [Address("lo", ip_address("127.0.0.1")), Address("eth0", ip_address("10.77.0.2"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: "decode-0")
        choose("addr:10.77.0.1", addresses=known)


SECRET = "the same everywhere"


def unauthenticated(site, capsys):
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        other = {"address": service.address, "secret": "another everywhere"}
        with tensorway.create("rendezvous", "direct", other) as client:
            try:
                client.get("/prod/leader")
            except errors.Unauthenticated as error:
                error.asked = error.asked.replace(service.address, "127.0.0.1:5600")
                raise


def record_refused(site, capsys):
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        service.put("/prod/leader", b"a", expected=0)
        service.put("/prod/leader", b"b", expected=0)


def lease_lost(site, capsys):
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        lease = service.lease(10)
        service.end(lease)
        service.put("/prod/workers/7", b"here", lease=lease)


def incompatible(site, capsys):
    agree("prefill-0", {"block_bytes": Fact(4096)}, {"block_bytes": Fact(65536)})


class Broadcast:
    """A tensor of one row that says it has four, as `expand` makes them."""

    shape, strides, itemsize, dtype = (4, 8), (0, 2), 2, "bfloat16"


def layout_invalid(site, capsys):
    ExpertLayout.of([{"w13": Broadcast()}], 8)


def placement_invalid(site, capsys):
    Placement(np.array([[0, 1, 2, 8]]), 8, 2)


def expert_lost(site, capsys):
    old, new = (Placement(np.array([row]), 4, 2) for row in ([0, 1, -1, 3], [0, 1, 2, 3]))
    TransferPlan.make(old, new, Topology.flat(2))


def staging_full(site, capsys):
    pool = Staging.on_host([("w13", 64, "cpu")], 6)
    lease = pool.lease(6, 3)
    lease.quarantine(lease.rows[:2])
    pool.lease(7, 4)


def excluded(site, capsys):
    with tensorway.create("rendezvous", "direct", {"secret": SECRET}) as service:
        first, _, last = (Membership(service, Group("/prod/experts", ("a", "b", "c"), me), 8) for me in range(3))
        first.regroup(None, ["c"], 10)
        last.regroup(None, ["a"], 10)


def ticket_invalid(site, capsys):
    about = {"engine": "prefill-0", "incarnation": "1", "group": "/prod/kv", "request": "cmpl-1", "epoch": 7}
    kept = tickets.Ticket(**about, tokens=32, blocks=((4, 9),), issued=1.8e9, expires=1.8e9 + 30)
    brought = tickets.issue(kept, SECRET)
    brought["body"] = brought["body"].replace("[4,9]", "[4,5]")
    tickets.open(brought, SECRET, 1.8e9)


RAISED = {
    "LayoutInvalid": layout_invalid,
    "PlacementInvalid": placement_invalid,
    "ExpertLost": expert_lost,
    "StagingFull": staging_full,
    "Excluded": excluded,
    "TicketInvalid": ticket_invalid,
    "AddressInvalid": address_invalid,
    "Unauthenticated": unauthenticated,
    "RecordRefused": record_refused,
    "LeaseLost": lease_lost,
    "Incompatible": incompatible,
    "MemoryInvalid": memory_invalid,
    "DescriptionInvalid": description_invalid,
    "DeadlineExceeded": deadline_exceeded,
    "TransferCancelled": transfer_cancelled,
    "PeerLost": peer_lost,
    "TransferFailed": transfer_failed,
    "Unsupported": unsupported,
    "Closed": closed,
    "BackendNotFound": backend_not_found,
    "BackendConflict": backend_conflict,
    "BackendUnavailable": backend_unavailable,
    "PluginDefect": plugin_defect,
    "OptionsInvalid": options_invalid,
    "SettingInvalid": setting_invalid,
    "OfferInvalid": offer_invalid,
    "HostBusy": host_busy,
    "NewPluginRefused": new_plugin_refused,
    "TensorwayError": tensorway_error,
}


# -- codes, each as (reason, remedy)


def record(host):
    """What stopped the only backend."""
    (slot,) = host.slots()
    host.probe_all()
    return slot.record.reason, slot.record.remedy


def complaint(host):
    """The only complaint about metadata."""
    (found,) = host.complaints
    return found.reason, found.remedy


def api_mismatch(site):
    site.dist(api="2")
    return record(site.host())


def conflict(site):
    for dist in ("acme", "zeta"):
        site.dist(dist)
    return complaint(site.host())


def construct_failed(site):
    host = broken(site, "def __init__(self, options, context): pass", "def __init__(self, *_): open('/srv/acme/lanes')")
    with pytest.raises(errors.BackendUnavailable):
        host.create("transport", "acme")
    return host.slots()[0].record.reason, host.slots()[0].record.remedy


def denied(site):
    site.dist()
    return record(site.host(deny=("acme",)))


def entry_point_invalid(site):
    site.dist(entries="[tensorway.transport]\nacme = acme.transport")
    return complaint(site.host())


def found_twice(site):
    site.dist(version="2.0")
    site.dist(version="1.0", where="lib64")
    return complaint(site.host())


def import_failed(site):
    site.dist()
    site.module("raise OSError('libacme.so.1: cannot open shared object file')")
    return record(site.host())


def metadata_stale(site):
    site.dist()
    return record(site.host())


def metadata_unreadable(site):
    (site.dist() / "entry_points.txt").write_bytes(b"[tensorway.transport]\nacme = \xff:f\n")
    return complaint(site.host())


def offer_invalid_record(site):
    return record(broken(site, OFFER, "pass"))


def probe_aborted(site):
    return record(broken(site, WORKS, "import os, signal; os.kill(os.getpid(), signal.SIGILL)"))


def probe_not_run(site):
    host = broken(site, WORKS, WORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", "")
        return record(host)


def probe_raised(site):
    return record(broken(site, WORKS, "raise KeyError('lanes')"))


def probe_timeout(site):
    host = broken(site, WORKS, "import time; time.sleep(60)")
    host.settings = type(host.settings)(probe_timeout=1)
    return record(host)


def too_many(site):
    site.dist(entries="[tensorway.transport]\n" + "\n".join(f"a{number} = acme:f" for number in range(300)))
    return complaint(site.host())


def unknown_hook(site):
    site.dist(entries="[tensorway.teleporter]\nacme = acme:teleporter")
    return complaint(site.host())


def unusable(site):
    return record(broken(site, WORKS, MISSING))


SITUATIONS = {
    "api-mismatch": api_mismatch,
    "conflict": conflict,
    "construct-failed": construct_failed,
    "denied": denied,
    "entry-point-invalid": entry_point_invalid,
    "found-twice": found_twice,
    "import-failed": import_failed,
    "metadata-stale": metadata_stale,
    "metadata-unreadable": metadata_unreadable,
    "offer-invalid": offer_invalid_record,
    "probe-aborted": probe_aborted,
    "probe-not-run": probe_not_run,
    "probe-raised": probe_raised,
    "probe-timeout": probe_timeout,
    "too-many": too_many,
    "unknown-hook": unknown_hook,
    "unusable": unusable,
}


def literal(section):
    """The first text block of a section."""
    return re.search(r"^```text\n(.*?)\n```$", section, re.DOTALL | re.MULTILINE)[1]


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_reads_as_the_catalogue_shows_it(name, site, page, capsys):
    with pytest.raises(errors.TensorwayError) as caught:
        RAISED[name](site, capsys)
    assert CLASSES[name] is type(caught.value)
    assert 3 == len(str(caught.value).splitlines())
    assert literal(page("reference/errors.md").sections(3)[name]) == site.harmless(f"{name}: {caught.value}")


def test_no_section_describes_an_error_that_does_not_exist(page):
    text = page("reference/errors.md").sections(2)["Errors"]
    assert set(re.findall(r"^### (\w+)$", text, re.MULTILINE)) == set(CLASSES) == set(RAISED)


@pytest.mark.parametrize("code", SITUATIONS)
def test_a_code_reads_as_the_catalogue_shows_it(code, site, page):
    reason, remedy = SITUATIONS[code](site)
    assert literal(page("reference/errors.md").sections(3)[code]) == site.harmless(f"{reason}\n-> {remedy}")


def test_the_log_says_once_that_auto_fell_back(page, caplog, tensorway_host):
    yes, no = tensorway.ProbeResult.passed("yes"), tensorway.ProbeResult.failed("no device")
    for name, result, priority in (("nixl", no, 70), ("plain", yes, 20)):
        offer = tensorway.Offer(
            name, "transport", "s", lambda result=result: result, print, priority=priority, probe_in="host"
        )
        tensorway_host.register(offer)
    caplog.clear()
    tensorway_host.create("transport")
    (said,) = [message.getMessage() for message in caplog.records if message.code == "fallback"]
    assert literal(page("reference/errors.md").sections(3)["fallback"]) == said


def codes_in(tree):
    """Strings that a module uses as a code: in the places where codes stand, and whatever looks like one."""
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if re.fullmatch(r"[a-z]+(-[a-z]+)+", text):
                yield text
            case ast.Call(
                func=ast.Name(id="Complaint" | "ProbeFailure") | ast.Attribute(attr="block"),
                args=[ast.Constant(value=text), *_],
            ):
                yield text
            case ast.Call(func=ast.Attribute(attr="_fail"), args=[_, ast.Constant(value=text), *_]):
                yield text
            case ast.Assign(targets=[ast.Name(id="code")], value=value):
                yield from (part.value for part in ast.walk(value) if isinstance(part, ast.Constant))
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "code" and isinstance(value, ast.Constant):
                        yield value.value


def test_every_code_of_the_sources_has_a_section_and_every_section_a_code(page):
    found = {code for file in PLUGINS.glob("*.py") for code in codes_in(ast.parse(file.read_text("utf-8")))}
    assert {"unusable", "conflict", "denied", "probe-timeout", "fallback"} <= found, "the search finds codes"
    assert set() == set(NO_CODES) - found, "no longer in the sources"
    text = page("reference/errors.md").sections(2)["Codes"]
    assert set(re.findall(r"^### ([a-z-]+)$", text, re.MULTILINE)) == found - set(NO_CODES) == {*SITUATIONS, "fallback"}


def test_the_catalogue_says_which_codes_are_defects(page):
    defects = [code for code, text in page("reference/errors.md").sections(3).items() if "*A defect.*" in text]
    assert slots.DEFECTS | {"conflict"} == set(defects)
