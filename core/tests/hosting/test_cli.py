"""The command line as people run it: real processes, real exit codes, never a traceback."""

from __future__ import annotations

import json
from importlib.resources import files

import jsonschema
import pytest

from tensorway.cli import exits

SCHEMAS = json.loads((files("tensorway.cli") / "schemas.json").read_text("utf-8"))

#: A plugin whose library is not there, as ours say it.
MISSING = """
from tensorway.types import Offer, ProbeResult
def probe():
    return ProbeResult.failed("NIXL cannot be loaded: nixl_cu12 is not installed", "Install it.")
def transport(ctx):
    return Offer("absent", "transport", "A test.", probe=probe, factory=lambda o, c: None)
"""
#: One whose library aborts the process that loads it.
ABORTS = """
import os, signal
from tensorway.types import Offer
def probe():
    os.kill(os.getpid(), signal.SIGILL)
def transport(ctx):
    return Offer("aborts", "transport", "A test.", probe=probe, factory=lambda o, c: None)
"""


def tensorway(site, *arguments, **environment):
    done = site.run("-m", "tensorway", *arguments, **environment)
    assert "Traceback" not in done.stderr + done.stdout
    return done


def answer(site, *arguments, **environment):
    """The JSON of a command, checked against its schema, with the exit code of the process."""
    done = tensorway(site, *arguments, "--json", **environment)
    data = json.loads(done.stdout)
    schema = {"$defs": SCHEMAS["$defs"], **SCHEMAS["$defs"][data["schema"]]}
    jsonschema.validate(data, schema, cls=jsonschema.Draft202012Validator)
    if "exit_code" in data:
        assert done.returncode == data["exit_code"]
    return data, done.returncode


def row(data, name):
    (found,) = [row for row in data["plugins"] if row["name"] == name]
    return found


# -- plugins


def test_plugins_list_shows_everything_and_imports_nothing(site):
    site.good("alpha")
    site.bad("bomb", "raise AssertionError('it was imported')")
    data, code = answer(site, "plugins", "list")
    assert exits.OK == code
    assert {"alpha", "bomb", "cpu", "cuda", "rocm", "xpu"} <= {row["name"] for row in data["plugins"]}
    assert {"declared"} == {row["state"] for row in data["plugins"]}
    assert "" == row(data, "bomb")["code"]


def test_plugins_list_of_one_kind_lists_that_kind(site):
    site.good("alpha")
    data, _ = answer(site, "plugins", "list", "--kind", "transport")
    assert {"transport"} == {row["kind"] for row in data["plugins"]}


def test_plugins_list_tells_what_metadata_is_wrong_with(site):
    site.dist("future", {"tensorway.teleporter": {"x": "m:f"}})
    done = tensorway(site, "plugins", "list")
    assert "teleporter" in done.stdout


def test_plugins_show_prints_the_offer_its_options_and_its_probe(site):
    site.good("alpha")
    data, code = answer(site, "plugins", "show", "alpha")
    shown = row(data, "alpha")
    assert (exits.OK, "usable", {"answer": 42}) == (code, shown["state"], shown["probe"]["facts"])
    options = {"name": "size", "type": "int", "default": "1"}, {"name": "name", "type": "str", "default": "'x'"}
    assert list(options) == shown["offer"]["options"]
    text = tensorway(site, "plugins", "show", "alpha").stdout
    assert "option size: int = 1" in text
    assert "answer = 42" in text


def test_plugins_show_of_an_unknown_name_is_not_found(site):
    data, code = answer(site, "plugins", "show", "nixle")
    assert (exits.NOT_FOUND, "BackendNotFound") == (code, data["error"])


# -- why


def test_why_prints_the_winner_and_a_reason_for_every_loser(site):
    site.good("alpha", priority=10)
    site.good("beta", priority=90)
    site.bad("absent", MISSING)
    data, code = answer(site, "why", "transport")
    assert (exits.OK, "beta") == (code, data["winner"]["name"])
    reasons = {loser["name"]: loser["reason"] for loser in data["losers"]}
    assert {
        "alpha": "priority 10; beta has 90",
        "absent": "NIXL cannot be loaded: nixl_cu12 is not installed",
        "local": "priority 10; beta has 90",
    } == reasons
    text = tensorway(site, "why", "transport", "auto").stdout
    assert "transport: beta from beta-dist" in text
    assert "not alpha (alpha-dist): priority 10; beta has 90" in text


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("why", "transport", "absent"), exits.UNAVAILABLE),
        (("why", "transport", "nobody"), exits.NOT_FOUND),
        (("why", "transport", "alpha", "--device", "cuda"), exits.UNAVAILABLE),
        (("why", "transport", "alpha", "--needs", "flying"), exits.UNAVAILABLE),
        (("why", "transport", "alpha", "--device", "cpu"), exits.OK),
        (("why", "no_kind", "alpha"), exits.NOT_FOUND),
        (("doctor", "--backend", "alpha"), exits.OK),
        (("doctor", "--backend", "transport:alpha"), exits.OK),
        (("doctor", "--backend", "alpha@alpha-dist"), exits.OK),
        (("doctor", "--backend", "absent"), exits.UNAVAILABLE),
        (("doctor", "--backend", "nobody"), exits.NOT_FOUND),
        (("doctor", "--backend", "offloading:alpha"), exits.NOT_FOUND),
        (("plugins", "show", "absent"), exits.UNAVAILABLE),
        (("doctor",), exits.OK),
    ],
)
def test_exit_codes(site, arguments, code):
    site.good("alpha")
    site.bad("absent", MISSING)
    assert code == answer(site, *arguments)[1]


# -- doctor


def test_doctor_examines_everything_and_a_missing_library_is_not_broken(site):
    site.good("alpha")
    site.bad("absent", MISSING)
    data, code = answer(site, "doctor")
    assert (exits.OK, []) == (code, data["broken"])
    found = row(data, "absent")
    assert ("unusable", "Install it.") == (found["code"], found["remedy"])
    chosen = {choice["request"]["kind"]: choice["winner"]["name"] for choice in data["choices"] if choice["winner"]}
    assert ("cpu", "alpha") == (chosen["platform"], chosen["transport"])


@pytest.mark.parametrize(
    ("source", "code", "words"),
    [
        (ABORTS, "probe-aborted", "SIGILL (an instruction that this CPU lacks)"),
        ("raise OSError('libx.so.1: cannot open shared object file')", "import-failed", "OSError: libx.so.1"),
        ("raise SystemExit(3)", "import-failed", "SystemExit: 3"),
    ],
)
def test_doctor_finds_what_is_broken_in_one_line_and_exits_with_it(site, source, code, words):
    site.good("alpha")
    site.bad("aborts", source)
    data, exit_code = answer(site, "doctor")
    found = row(data, "aborts")
    assert (exits.BROKEN, code, True) == (exit_code, found["code"], words in found["reason"])
    assert ["transport:aborts@aborts-dist"] == data["broken"]
    assert "\n" not in found["reason"]
    assert "alpha" in [choice["winner"]["name"] for choice in data["choices"] if choice["winner"]]


def test_doctor_shows_a_conflict_of_names(site):
    site.good("nixl", dist="acme-nixl")
    site.good("nixl", dist="zeta-nixl")
    data, code = answer(site, "doctor")
    assert exits.BROKEN == code
    assert ["conflict: transport 'nixl' is offered by 2 dists: acme-nixl, zeta-nixl"] == data["broken"]


def test_doctor_names_a_misspelt_variable(site):
    data, _ = answer(site, "doctor", TENSORWAY_PLUGIN="nixl")
    assert {"TENSORWAY_PLUGIN": "TENSORWAY_PLUGINS"} == data["unknown_variables"]
    assert "Did you mean TENSORWAY_PLUGINS?" in tensorway(site, "doctor", TENSORWAY_PLUGIN="nixl").stdout


def test_doctor_shows_everything_in_strict_mode_too(site):
    site.bad("aborts", "raise OSError('no')")
    site.bad("absent", MISSING)
    data, code = answer(site, "doctor", TENSORWAY_STRICT="1")
    assert (exits.BROKEN, "unusable") == (code, row(data, "absent")["code"])


def test_doctor_shows_tracebacks_only_when_asked(site):
    site.bad("aborts", "raise OSError('no')")
    assert "| Traceback" in site.run("-m", "tensorway", "doctor", "--debug").stdout
    assert "Traceback" not in tensorway(site, "doctor").stdout


def test_doctor_gives_a_hanging_probe_its_seconds_and_no_more(site):
    site.bad(
        "hangs",
        MISSING.replace('"absent"', '"hangs"').replace(
            "    return ProbeResult", "    import time; time.sleep(600)\n    return ProbeResult"
        ),
    )
    data, code = answer(site, "doctor", "--probe-timeout", "0.5")
    assert (exits.BROKEN, "probe-timeout") == (code, row(data, "hangs")["code"])


# -- check

#: A transport that drives `local`, with a lane of the test's making.
DRIVEN = """
import os, time
import attrs
from tensorway.types import Offer, ProbeResult
from tensorway.transport import Endpoint
from tensorway.transport.local import LocalFabric
@attrs.frozen
class Options:
    name: str = ""
class Fabric(LocalFabric):
    name = "driven"
    {body}
def construct(options, context):
    return Endpoint(Fabric(), options.name)
def probe():
    return ProbeResult.passed("it works", version="7.1")
def transport(ctx):
    return Offer("driven", "transport", "A test.", probe=probe, factory=construct, options=Options,
                 capabilities={{"read"}})
"""
#: No notifications; it aborts where it meets a peer that was restarted, and hangs when its process forks.
TREACHEROUS = """
    capabilities = attrs.evolve(LocalFabric.capabilities, notify=False)
    def lane(self, link):
        if link.name == "engine-1":
            os.abort()
        return super().lane(link)
os.register_at_fork(after_in_parent=lambda: time.sleep(600))
"""


def driven(site, body="pass"):
    site.bad("driven", DRIVEN.format(body=body.strip()))


def check(site, *arguments, tmp_path, **environment):
    """The JSON that is printed, which is also what the file holds."""
    path = tmp_path / "report.json"
    data, code = answer(site, "check", *arguments, "--output", str(path), **environment)
    if data["schema"] == "tensorway.conformance/1":
        assert data == json.loads(path.read_text("utf-8"))
    return data, code


def test_check_runs_every_test_whatever_one_does_and_writes_what_came_of_it(site, tmp_path):
    driven(site, TREACHEROUS)
    data, code = check(site, "driven@driven-dist", "--deadline", "8", tmp_path=tmp_path)
    assert (exits.BROKEN, ["OfferSuite", "TransportSuite"], []) == (code, data["suites"], data["left_out"])
    assert ("driven-dist", "1.0", ["read"]) == (data["dist"], data["version"], data["capabilities"])
    assert "7.1" == data["probe"]["facts"]["version"]
    tests = {test["id"].partition("::")[2]: test for test in data["tests"]}
    failed = {name: test["reason"] for name, test in tests.items() if test["outcome"] == "failed"}
    assert {
        "test_a_restarted_peer_is_another_incarnation": "its process was killed by SIGABRT",
        "test_a_forked_child_is_refused_and_the_parent_goes_on": "no end after 8 s",
    } == failed
    remedy = tests["test_a_restarted_peer_is_another_incarnation"]["remedy"]
    assert "put an incarnation into the description, and compare it." == remedy
    skipped = {test["reason"] for test in tests.values() if test["outcome"] == "skipped"}
    assert {"needs the capability notify", "needs the capabilities notify and write"} == skipped
    assert "passed" == tests["test_statistics_count_what_was_moved_and_what_failed"]["outcome"]  # the last of them
    totals = data["totals"]
    assert (len(data["tests"]) - 4, 2, 2) == (totals["passed"], totals["failed"], totals["skipped"])


def test_check_of_what_has_no_suite_of_its_own_says_so(site, tmp_path):
    site.good("alpha", "rendezvous")
    data, code = check(site, "alpha", tmp_path=tmp_path)
    assert (exits.OK, ["OfferSuite"]) == (code, data["suites"])
    assert [{"suite": "", "reason": "the kit has no suite for a rendezvous yet"}] == data["left_out"]


def test_check_of_a_probe_only_transport_says_what_is_left_out(site, tmp_path):
    site.good("alpha")
    path = site.path / "alpha_dist.py"
    path.write_text(path.read_text().replace("factory=Backend, ", ""))
    data, code = check(site, "alpha", tmp_path=tmp_path)
    assert (exits.OK, ["OfferSuite"]) == (code, data["suites"])
    assert [("TransportSuite", "this version of the backend constructs nothing")] == [
        (row["suite"], row["reason"]) for row in data["left_out"]
    ]


def test_check_refuses_what_cannot_be_checked(site, tmp_path):
    site.bad("absent", MISSING)
    site.bad("breaks", "raise OSError('libx.so.1: no such file')")
    for name in ("alpha-one", "alpha-two"):
        site.good("alpha", dist=name)
    cases = {
        ("absent",): (exits.UNAVAILABLE, "BackendUnavailable", "Install it."),
        ("breaks",): (exits.BROKEN, "PluginDefect", ""),
        ("nobody",): (exits.NOT_FOUND, "BackendNotFound", ""),
        ("alpha",): (exits.UNAVAILABLE, "BackendConflict", "Say which: --hook KIND, or NAME@DIST."),
        ("cpu", "--hook", "transport"): (exits.NOT_FOUND, "BackendNotFound", ""),
    }
    for arguments, (code, error, to_do) in cases.items():
        data, found = check(site, *arguments, tmp_path=tmp_path)
        assert (code, error) == (found, data["error"]), arguments
        assert to_do in data["to_do"]
    data, _ = check(site, "absent", tmp_path=tmp_path)
    assert "It cannot be used here: NIXL cannot be loaded: nixl_cu12 is not installed." == data["true"]
    data, code = answer(site, "check", "cpu", "--output", str(tmp_path / "no" / "report.json"))
    assert (exits.USAGE, True) == (code, "cannot be written to" in data["true"])
    assert [] == [path for path in tmp_path.iterdir() if path != site.path]


def test_check_asks_one_of_two_dists_of_one_name(site, tmp_path):
    site.good("alpha", "rendezvous", dist="alpha-one")
    site.good("alpha", "rendezvous", dist="alpha-two")
    data, code = check(site, "alpha@alpha-two", "--hook", "rendezvous", tmp_path=tmp_path)
    assert (exits.OK, "alpha-two") == (code, data["dist"])


def test_check_without_pytest_says_how_to_get_it(site):
    code = "import importlib.util, sys; from tensorway.cli import main; find = importlib.util.find_spec; "
    code += "importlib.util.find_spec = lambda name, *rest: None if name == 'pytest' else find(name, *rest); "
    done = site.run("-c", code + "sys.exit(main(['check', 'local']))")
    assert (exits.UNAVAILABLE, 3) == (done.returncode, len(done.stderr.splitlines()))
    assert 'pip install "tensorway[testing]"' in done.stderr


# -- probe


def test_probe_puts_the_transports_that_work_side_by_side_with_a_memmove(site):
    driven(site)
    site.bad("absent", MISSING)
    data, code = answer(site, "probe")
    assert (exits.OK, ["driven", "local"]) == (code, [row["name"] for row in data["transports"]])
    for row_ in data["transports"]:
        assert ("cma", "", "", True) == tuple(row_[key] for key in ("lane", "slow", "error", "verified"))
        assert 0 < row_["latency_median"] <= row_["latency_p95"]
        # A ratio of two figures of the same answer, and nothing that a busy machine could fail.
        assert row_["bandwidth_ratio"] == pytest.approx(data["memmove"]["bandwidth"] / row_["bandwidth"], abs=0.02)


def test_probe_of_one_transport_that_fails_says_so_and_measures_the_others(site):
    driven(site, "def lane(self, link): raise OSError('no way through')")
    data, code = answer(site, "probe")
    errors = {row_["name"]: row_["error"] for row_ in data["transports"]}
    assert (exits.UNAVAILABLE, "OSError: no way through", "") == (code, errors["driven"], errors["local"])
    assert "driven       failed: OSError: no way through" in tensorway(site, "probe", "--transport", "driven").stdout


@pytest.mark.parametrize(("name", "code"), [("absent", exits.UNAVAILABLE), ("nobody", exits.NOT_FOUND)])
def test_probe_of_a_transport_that_cannot_be_used_is_an_error(site, name, code):
    site.bad("absent", MISSING)
    assert code == answer(site, "probe", "--transport", name)[1]


# -- errors, form


def test_parts_of_the_demo_are_no_backends(site):
    site.dist("acme-kv", {"tensorway.demo": {"handover": "acme_kv:show"}})
    found = site.scan()
    assert ((), (), ()) == (found.declarations, found.complaints, found.commands)
    assert [("demo", "handover", "acme-kv")] == [(row.kind, row.name, row.dist) for row in found.demos]


@pytest.mark.parametrize(
    ("environment", "error"),
    [({"TENSORWAY_STRICT": "perhaps"}, "SettingInvalid"), ({"TENSORWAY_PLUGINS": "nixle"}, "SettingInvalid")],
)
def test_an_error_has_three_lines_and_a_code(site, environment, error):
    site.good("nixl")
    done = tensorway(site, "plugins", "list", **environment)
    lines = done.stderr.splitlines()
    assert (exits.USAGE, "", 3, True) == (done.returncode, done.stdout, len(lines), lines[0].startswith(f"{error}: "))
    data, code = answer(site, "plugins", "list", **environment)
    assert (exits.USAGE, error) == (code, data["error"])


def test_debug_shows_the_traceback(site):
    done = site.run("-m", "tensorway", "plugins", "show", "nobody", "--debug")
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("why",), ("doctor", "--probe-timeout", "never")])
def test_a_command_line_that_cannot_be_meant_is_usage(site, arguments):
    done = tensorway(site, *arguments)
    assert (exits.USAGE, True) == (done.returncode, "usage: tensorway" in done.stderr)


def test_version_and_help_are_there(site):
    import importlib.metadata

    assert f"tensorway {importlib.metadata.version('tensorway')}\n" == tensorway(site, "--version").stdout
    text = tensorway(site, "--help", COLUMNS="80").stdout
    assert all(command in text for command in ("doctor", "plugins", "why", "new-plugin", "check", "probe"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("doctor",),
        ("plugins", "list"),
        ("why", "transport"),
        ("plugins", "show", "alpha"),
        ("probe", "--transport", "local"),
        ("check", "cpu", "--hook", "platform", "--output", "FILE"),
    ],
)
def test_text_fits_80_columns_and_has_no_color_in_a_pipe(site, arguments):
    site.good("alpha")
    site.bad("absent", MISSING)
    site.bad("aborts", "raise OSError('" + "a long explanation " * 20 + "')")
    done = tensorway(site, *(str(site.path / "report.json") if word == "FILE" else word for word in arguments))
    # A word that is longer than a line (a path) stays whole, so that it can be copied.
    too_long = [line for line in done.stdout.splitlines() if len(line) > 80 and " " in line.strip()]
    assert [] == too_long
    assert "\x1b" not in done.stdout


def test_a_reader_that_goes_away_is_no_error(site):
    site.good("alpha")
    code = """
    import subprocess, sys
    done = subprocess.run(f"{sys.executable} -m tensorway doctor | head -1", shell=True, capture_output=True, text=True)
    print(done.stderr)
    """
    assert "" == site.python(code).stdout.strip()


def test_every_schema_is_itself_valid_and_used():
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)
    named = {name for name in SCHEMAS["$defs"] if name.startswith("tensorway.")}
    from pathlib import Path

    import tensorway.cli

    source = "".join(path.read_text("utf-8") for path in Path(tensorway.cli.__file__).parent.glob("*.py"))
    assert named == {name for name in named if f'"{name}"' in source}
