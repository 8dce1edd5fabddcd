"""The host as its users meet it: real metadata, real modules, real imports, in folders made for the test."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

import tensorway
from tensorway import plugins
from tensorway.errors import (
    BackendConflict,
    BackendNotFound,
    BackendUnavailable,
    HostBusy,
    OptionsInvalid,
    PluginDefect,
)
from tensorway.hookspecs import API, HOOKS
from tensorway.plugins.slots import SlotState
from tensorway.settings import Settings
from tensorway.types import Offer, ProbeResult


def offer(name: str = "x", kind: str = "transport", **fields) -> Offer:
    given = {
        "probe": lambda: ProbeResult.passed("yes"),
        "probe_in": "host",
        "factory": lambda options, context: object(),
    }
    return Offer(name=name, kind=kind, summary="A test.", **given | fields)


def only(host, name: str):
    (slot,) = host.named(name)
    return slot


# -- discovery


def test_discovery_imports_no_plugin(site):
    for name in ("alpha", "beta", "gamma"):
        site.good(name)
    before = set(sys.modules)
    host = site.host()
    assert ["alpha", "beta", "gamma"] == [slot.declaration.name for slot in host.slots("transport")]
    assert {SlotState.DECLARED} == {slot.state for slot in host.slots()}
    assert set() == {name for name in set(sys.modules) - before if name.endswith("_dist")}


def test_asking_for_one_imports_that_one_only(site):
    site.good("alpha")
    site.good("beta")
    backend = site.host().create("transport", "beta")
    assert ("beta_dist", False) == (type(backend).__module__, "alpha_dist" in sys.modules)


def test_a_plugin_is_loaded_and_probed_once_however_often_it_is_asked_for(site):
    site.good("alpha")
    with (site.path / "alpha_dist.py").open("a") as file:
        file.write("\nloads = probes = 0\n_probe = probe\n_hook = transport\n")
        file.write("def probe():\n    global probes; probes += 1; return _probe()\n")
        file.write("def transport(ctx):\n    global loads; loads += 1; return _hook(ctx)\n")
    host = site.host()
    for _ in range(3):
        host.create("transport", "alpha")
        host.create("transport")
        host.offers("transport")
        host.probe_all()
    module = sys.modules["alpha_dist"]
    assert (1, 1) == (module.loads, module.probes)


def test_the_four_states_are_walked_one_by_one(site):
    site.good("alpha")
    host = site.host()
    slot = only(host, "alpha")
    states = [slot.state]
    slot.load(host.context, 10)
    states.append(slot.state)
    slot.probe(10)
    states.append(slot.state)
    host.create("transport", "alpha")
    states.append(slot.state)
    assert [SlotState.DECLARED, SlotState.LOADABLE, SlotState.USABLE, SlotState.CONSTRUCTED] == states
    assert slot.record is None


# -- each failure is a record


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        ("import no_such_library_anywhere", "import-failed", "No module named 'no_such_library_anywhere'"),
        ("raise OSError('libx.so.1: cannot open shared object file')", "import-failed", "OSError: libx.so.1"),
        ("raise SystemExit(3)", "import-failed", "SystemExit: 3"),
        ("import sys; sys.exit('bye')", "import-failed", "SystemExit: bye"),
        ("raise RuntimeError", "import-failed", "RuntimeError"),
        ("def transport(:", "import-failed", "SyntaxError"),
        ("nothing = 1", "metadata-stale", "has no attribute 'transport'"),
        ("transport = 3", "offer-invalid", "refers to a value of type int, not to a function"),
        ("async def transport(ctx): ...", "offer-invalid", "its hook is async"),
        ("def transport(ctx): return None", "offer-invalid", "returned NoneType, not an Offer"),
        ("def transport(context): ...", "offer-invalid", "transport(context), and the contract is transport(ctx"),
        ("def transport(ctx): raise KeyError('x')", "import-failed", "KeyError: 'x'"),
        ("def transport(ctx): raise SystemExit(1)", "import-failed", "SystemExit: 1"),
    ],
)
def test_what_goes_wrong_while_loading_is_a_record_with_a_remedy(site, source, code, words):
    site.bad("broken", source)
    site.good("fine")
    host = site.host()
    assert "fine" == host.decide("transport").winner.name
    record = only(host, "broken").record
    assert (code, SlotState.LOADABLE, True) == (record.code, record.state, words in record.reason)
    assert record.remedy
    assert ("broken-dist", "1.0") == (record.dist, record.version)


def test_an_offer_for_something_else_is_refused(site):
    site.good("alpha")
    site.dist(
        "liar",
        {
            "tensorway.offloading": {"alpha": "alpha_dist:transport"},
            "tensorway.transport": {"other": "alpha_dist:transport"},
        },
    )
    host = site.host()
    host.probe_all()
    # A hook of another name is refused by its signature's name already being wrong for nobody: the offer tells.
    assert {"offer-invalid"} == {slot.record.code for slot in host.slots() if slot.declaration.dist == "liar"}


def test_metadata_of_a_package_that_is_gone_is_called_stale(site):
    site.dist("gone", {"tensorway.transport": {"gone": "gone_package.offers:transport"}})
    host = site.host()
    host.probe_all()
    record = only(host, "gone").record
    assert ("metadata-stale", True) == (record.code, "pip install --force-reinstall gone" in record.remedy)


def test_a_plugin_that_asks_for_itself_while_it_is_imported_is_refused(site):
    site.bad("loop", "from tensorway import plugins\nplugins.host().decide('transport', 'loop')\n")
    host = site.host()
    plugins._host, before = host, plugins._host
    try:
        host.probe_all()
    finally:
        plugins._host = before
    assert "asks for this very backend" in only(host, "loop").record.reason


def test_two_plugins_that_import_each_other_do_not_hang(site):
    source = "import {other}_dist\nfrom tensorway import plugins\nplugins.host().offers('transport')\n"
    site.bad("ping", source.format(other="pong"))
    site.bad("pong", source.format(other="ping"))
    site.good("fine")
    host = site.host()
    plugins._host, before = host, plugins._host
    try:
        threads = [threading.Thread(target=host.offers, args=("transport",), daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    finally:
        plugins._host = before
    assert not any(thread.is_alive() for thread in threads)
    assert "fine" == host.decide("transport", "fine").winner.name


def test_a_plugin_of_another_api_is_refused_before_anything_of_it_is_imported(site):
    site.module("m", "raise AssertionError('it was imported')")
    site.dist("future", {"tensorway.transport": {"future": "m:transport"}}, api=str(API + 1))
    site.dist("undeclared", {"tensorway.transport": {"undeclared": "m:transport"}}, api=None)
    site.dist("past", {"tensorway.transport": {"past": "m:transport"}}, api="0")
    host = site.host()
    host.probe_all()
    records = {slot.declaration.name: slot.record for slot in host.slots()}
    assert {"api-mismatch"} == {record.code for record in records.values()}
    assert ("Upgrade tensorway.", "Upgrade past.") == (records["future"].remedy, records["past"].remedy)
    assert "tensorway.api" in records["undeclared"].remedy
    assert "m" not in sys.modules


def test_a_probe_that_dies_natively_is_a_record_and_the_host_lives(site):
    site.good("dead", probe_in="child")
    with (site.path / "dead_dist.py").open("a") as file:
        file.write("\ndef probe():\n    import os, signal\n    os.kill(os.getpid(), signal.SIGILL)\n")
    host = site.host()
    with pytest.raises(BackendUnavailable, match="SIGILL"):
        host.create("transport", "dead")
    assert "probe-aborted" == only(host, "dead").record.code


def test_failures_are_remembered_not_repeated(site):
    site.bad("broken", "import builtins\nbuiltins.tries = getattr(builtins, 'tries', 0) + 1\nraise OSError('no')")
    host = site.host()
    for _ in range(5):
        with pytest.raises(BackendUnavailable):
            host.create("transport", "broken")
    import builtins

    assert 1 == builtins.tries
    del builtins.tries


def test_a_construction_that_failed_may_be_tried_again(site):
    attempts = []

    def factory(options, context):
        attempts.append(1)
        if len(attempts) == 1:
            raise OSError("port in use")
        return "built"

    with plugins.isolated([offer(factory=factory)]) as host:
        with pytest.raises(BackendUnavailable, match="OSError: port in use") as caught:
            host.create("transport", "x")
        assert isinstance(caught.value.__cause__, OSError)
        assert "built" == host.create("transport", "x")
        assert SlotState.CONSTRUCTED is only(host, "x").state


def test_a_factory_that_calls_sys_exit_ends_nobody():
    def factory(options, context):
        raise SystemExit(3)

    with plugins.isolated([offer(factory=factory)]) as host:
        with pytest.raises(BackendUnavailable, match="SystemExit: 3"):
            host.create("transport", "x")
        assert "construct-failed" == only(host, "x").record.code


def test_a_typed_error_of_a_factory_reaches_the_caller_as_it_is():
    def factory(options, context):
        raise OptionsInvalid("asked", "true", "to do")

    with plugins.isolated([offer(factory=factory)]) as host, pytest.raises(OptionsInvalid, match="asked"):
        host.create("transport", "x")


# -- said once


def test_a_failure_is_logged_once_in_one_line(site, caplog):
    site.bad("broken", "raise OSError('libx.so.1: cannot\\nopen')")
    host = site.host()
    for _ in range(3):
        host.decide("transport")
        host.probe_all()
    assert ["transport broken (broken-dist 1.0) is not available: OSError: libx.so.1: cannot open"] == caplog.messages
    (record,) = caplog.records
    assert (logging.WARNING, "tensorway.plugins", "import-failed") == (record.levelno, record.name, record.code)
    assert record.exc_info is None


def test_only_local_rank_zero_logs(site, caplog):
    site.bad("broken", "raise OSError('no')")
    host = site.host(Settings(local_rank=1))
    host.probe_all()
    assert ("import-failed", []) == (only(host, "broken").record.code, caplog.messages)


def test_auto_says_once_that_it_fell_back(caplog):
    better = offer("better", priority=90, probe=lambda: ProbeResult.failed("no device"))
    with plugins.isolated([better, offer("plain")]) as host:
        caplog.clear()
        for _ in range(3):
            host.create("transport")
    said = [message for message in caplog.messages if "auto: using" in message]
    assert [
        "transport auto: using plain, because better cannot be used here; tensorway why transport auto says why"
    ] == said


def test_auto_does_not_call_it_falling_back_to_pass_over_what_was_not_asked_for(caplog):
    rows = [offer("gpu", priority=90, devices={"cuda"}), offer("idle", priority=90, factory=None), offer("plain")]
    with plugins.isolated(rows) as host:
        host.create("transport", device="cpu")
    assert [] == caplog.messages


# -- names


def test_two_dists_of_one_name_are_a_conflict_until_one_is_named(site, caplog):
    site.good("nixl", dist="acme-nixl")
    site.good("nixl", dist="zeta-nixl")
    host = site.host()
    assert ["conflict"] == [complaint.code for complaint in host.complaints]
    assert 1 == len([message for message in caplog.messages if "offered by 2 dists" in message])
    with pytest.raises(BackendConflict, match="nixl@acme-nixl, nixl@zeta-nixl"):
        host.create("transport", "nixl")
    assert host.decide("transport").winner is None
    assert "zeta_nixl" == type(host.create("transport", "nixl@zeta-nixl")).__module__


def test_a_conflict_is_resolved_by_denying_one_dist(site):
    site.good("nixl", dist="acme-nixl")
    site.good("nixl", dist="zeta-nixl")
    host = site.host(Settings(deny=("nixl@acme-nixl",)))
    assert () == host.complaints
    assert "zeta-nixl" == host.decide("transport", "nixl").winner.dist


def test_a_dist_may_be_spelled_in_any_of_its_ways(site):
    site.good("nixl", dist="acme-nixl")
    site.good("nixl", dist="zeta-nixl")
    for spelling in ("acme-nixl", "Acme_NIXL", "acme.nixl"):
        assert "acme-nixl" == site.host().decide("transport", f"nixl@{spelling}").winner.dist
        denied = site.host(Settings(deny=(f"nixl@{spelling}",)))
        assert "zeta-nixl" == denied.decide("transport", "nixl").winner.dist


def test_an_unknown_name_lists_what_is_offered_and_what_is_near(site):
    site.good("nixl")
    with pytest.raises(BackendNotFound) as caught:
        site.host().create("transport", "nixle")
    assert "No installed plugin offers it. Offered: nixl." == caught.value.true
    assert "Did you mean 'nixl'?" in caught.value.to_do


def test_a_name_that_is_an_extra_of_the_core_comes_with_its_install_line(site):
    with pytest.raises(BackendNotFound, match=r'pip install "tensorway\[nixl\]"'):
        site.host().create("transport", "nixl")


def test_a_dist_that_is_installed_and_lacks_the_entry_point_is_diagnosed(site):
    site.dist("tensorway-ghost", {"console_scripts": {"x": "y:z"}}, api=None, version="0.3")
    with pytest.raises(BackendNotFound, match=r"tensorway-ghost 0\.3 is installed, but its metadata does not offer it"):
        site.host().create("transport", "ghost")


def test_an_unknown_kind_is_refused_with_the_near_one(site):
    with pytest.raises(BackendNotFound, match="Did you mean 'transport'"):
        site.host().create("transports", "x")


# -- allow, deny, strict


def test_the_allow_list_leaves_out_everything_else(site):
    site.good("alpha")
    site.good("beta")
    host = site.host(Settings(allow=("alpha",)))
    assert {"alpha": "", "beta": "denied"} == {
        slot.declaration.name: slot.record.code if slot.record else "" for slot in host.slots()
    }
    with pytest.raises(BackendUnavailable, match="TENSORWAY_PLUGINS leaves it out"):
        host.create("transport", "beta")


@pytest.mark.parametrize("item", ["beta", "transport:beta", "beta@beta-dist", "transport:beta@beta-dist"])
def test_the_deny_list_takes_one_out(site, item, caplog):
    site.good("alpha")
    site.good("beta")
    host = site.host(Settings(deny=(item,)))
    host.probe_all()
    assert ["beta"] == [slot.declaration.name for slot in host.slots() if slot.record]
    assert [] == caplog.messages, "who denies a plugin need not be warned"
    assert "beta_dist" not in sys.modules


def test_a_selector_of_another_kind_or_dist_selects_nothing(site):
    site.good("beta")
    host = site.host(Settings(deny=("offloading:beta", "beta@other")))
    assert [] == [slot for slot in host.slots() if slot.record]


def test_an_unknown_name_on_the_allow_list_is_an_error_with_the_near_one(site):
    from tensorway.errors import SettingInvalid

    site.good("alpha")
    with pytest.raises(SettingInvalid, match="Did you mean 'alpha'"):
        site.host(Settings(allow=("alpa",)))


def test_the_core_stays_when_an_allow_list_names_plugins(site):
    site.good("alpha")
    host = plugins.Host(plugins._scan.scan(), Settings(allow=("alpha",)))
    assert {None} == {slot.record for slot in host.slots("platform")}


def test_strict_mode_raises_on_a_broken_plugin_and_not_on_an_unusable_one(site):
    site.good("alpha")
    site.bad("broken", "raise OSError('no')")
    unusable = offer("unusable", probe=lambda: ProbeResult.failed("no device", "Plug it in."))
    host = site.host(Settings(strict=True))
    host.register(unusable)
    assert only(host, "unusable").probe(5) is None or not only(host, "unusable").probe_result.usable
    with pytest.raises(PluginDefect, match="broken-dist"):
        host.decide("transport")


def test_strict_mode_raises_on_a_conflict(site):
    site.good("nixl", dist="acme-nixl")
    site.good("nixl", dist="zeta-nixl")
    with pytest.raises(PluginDefect, match="offered by 2 dists"):
        site.host(Settings(strict=True))


# -- create


def test_options_and_context_reach_the_factory_validated(site):
    site.good("alpha")
    host = site.host()
    backend = host.create("transport", "alpha", {"size": 3}, context="the context")
    assert (3, "x", "the context") == (backend.options.size, backend.options.name, backend.context)
    with pytest.raises(OptionsInvalid, match="Did you mean 'size'"):
        host.create("transport", "alpha", {"sise": 3})


def test_what_is_wanted_of_auto_is_respected():
    rows = [offer("big", priority=90), offer("gpu", devices={"cuda"}), offer("writer", capabilities={"write"})]
    with plugins.isolated(rows) as host:
        assert ["big", "gpu", "writer"] == [
            host.decide("transport", **wants).winner.name for wants in ({}, {"device": "cuda"}, {"needs": {"write"}})
        ]


def test_nothing_usable_tells_the_reason_of_each(site):
    refused = offer("refused", probe=lambda: ProbeResult.failed("no device"))
    with plugins.isolated([refused, offer("idle", factory=None)]) as host:
        with pytest.raises(BackendUnavailable) as caught:
            host.create("transport")
        expected = (
            "None of 2 can be used: idle: it reports what is here and constructs nothing yet; refused: no device."
        )
        assert expected == caught.value.true
        with pytest.raises(BackendUnavailable, match="No installed plugin offers a rendezvous"):
            host.create("rendezvous")


def test_a_hook_without_its_argument_is_as_good(site):
    site.good("alpha")
    text = (site.path / "alpha_dist.py").read_text().replace("def transport(ctx)", "def transport()")
    (site.path / "alpha_dist.py").write_text(text)
    assert site.host().create("transport", "alpha") is not None


# -- the process


def test_eight_threads_share_one_host_and_one_construction_each(site):
    site.good("slow", probe_in="child")
    with (site.path / "slow_dist.py").open("a") as file:
        file.write("\nimport time; time.sleep(0.2)\n")
    host, built = site.host(), []
    threads = [threading.Thread(target=lambda: built.append(host.create("transport", "slow"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (8, 1) == (len(built), len({type(backend) for backend in built}))


def test_a_load_that_never_ends_costs_the_others_a_deadline_not_a_hang(site):
    site.good("fine")
    site.bad("stuck", "import builtins\nbuiltins.stuck_event.wait(30)\nraise OSError('at last')")
    import builtins

    builtins.stuck_event = threading.Event()
    host = site.host(Settings(probe_timeout=0.5))
    thread = threading.Thread(target=host.decide, args=("transport", "stuck"), daemon=True)
    thread.start()
    try:
        for _ in range(100):
            if "stuck_dist" in sys.modules:
                break
            threading.Event().wait(0.02)
        with pytest.raises(HostBusy, match=r"for more than 0\.5 s"):
            host.create("transport", "fine")
        assert 2 == len(host.slots()), "listing does not wait"
    finally:
        builtins.stuck_event.set()
        thread.join(20)
        del builtins.stuck_event


def test_isolated_hosts_see_nothing_and_leave_nothing(tensorway_host):
    assert () == tensorway_host.slots()
    assert tensorway_host is plugins.host()
    with plugins.isolated([offer()]) as inner:
        assert inner is plugins.host()
        assert tensorway.create("transport", "x") is not None
        assert "x" == tensorway.decide("transport").winner.name
    assert tensorway_host is plugins.host()


def test_registering_one_name_twice_is_a_conflict(tensorway_host):
    plugins.register(offer())
    with pytest.raises(BackendConflict):
        plugins.register(offer())


def test_refresh_finds_what_was_installed_meanwhile_and_keeps_what_was_registered(site, monkeypatch):
    monkeypatch.setattr(plugins, "_host", None)
    plugins.register(offer("mine"))
    assert [] == [slot for slot in plugins.host().slots() if slot.declaration.name == "late"]
    site.good("late")
    with pytest.raises(BackendNotFound, match="refresh"):
        plugins.host().named("late")
    assert ["late", "mine"] == sorted(
        slot.declaration.name
        for slot in plugins.refresh().slots("transport")
        if slot.declaration.name in ("late", "mine")
    )


def test_refresh_forgets_failures(site, monkeypatch, caplog):
    monkeypatch.setattr(plugins, "_host", None)
    site.bad("broken", "raise OSError('no')")
    with pytest.raises(BackendUnavailable):
        tensorway.create("transport", "broken")
    site.module(
        "broken_dist",
        """
        from tensorway.types import Offer, ProbeResult
        def transport(ctx):
            def probe(): return ProbeResult.passed("y")
            return Offer("broken", "transport", "s", probe=probe, factory=lambda o, c: "built", probe_in="host")
        """,
    )
    plugins.refresh()
    assert "built" == tensorway.create("transport", "broken")


def test_refresh_lets_a_library_that_was_absent_be_found(site, monkeypatch):
    from tensorway.native import Absent, Loaded, NativeLibrary

    monkeypatch.setattr(plugins, "_host", None)
    library = NativeLibrary("Acme", ("acme_late",), {"Lane": "lanes:Lane"}, "Install it.")
    assert isinstance(library.result(), Absent)
    (site.path / "acme_late").mkdir()
    (site.path / "acme_late" / "lanes.py").write_text("Lane = 1")
    assert isinstance(library.result(), Absent)
    plugins.refresh()
    assert isinstance(library.result(), Loaded)


def test_refresh_looks_at_the_platforms_again(monkeypatch):
    from tensorway import platforms

    monkeypatch.setattr(plugins, "_host", None)
    before = platforms.report("cpu")
    assert before is platforms.report("cpu")
    plugins.refresh()
    assert before is not platforms.report("cpu")


def test_every_kind_of_the_contract_is_a_hook_and_takes_one_ctx():
    import inspect

    assert list(HOOKS) == [name for name in HOOKS if list(inspect.signature(HOOKS[name]).parameters) == ["ctx"]]
