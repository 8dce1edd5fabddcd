"""`tensorway demo`: what it shows, what it says of what is not there, and what becomes of it when something dies."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from demo_runs import QUICK, SCHEMAS, command_of, ranks_below

from tensorway.cli import exits

#: Whatever this machine has installed, only what a test brings is shown.
ALONE = {"TENSORWAY_PLUGINS": "-rebalance,-handover,-offload"}
SHOWN = """
from tensorway.cli.charts import Chart, Series
from tensorway.cli.demonstration import Ratio, Shown
from tensorway.errors import PeerLost, Unsupported
def show(stage):
    stage.say(0.5, "half of it")
    {body}
"""
GOOD = (
    "return Shown(stage.transport or 'acme', 2, 1 << 20, {right}, ('0.5 x', 'a memmove'), 'It <moved>.', "
    "(Ratio('moving', 'a memmove', 1.0, 2.0),), (Chart('A <chart>', 'size', (Series('one', (1.0, 2.34567)),)),))"
)


def brings(folder, movement, body, dist="acme-demo"):
    folder.brings(movement, SHOWN.format(body=body), dist)


def only(movement):
    """Everything of ours left out; of this movement, what is not ours is there."""
    others = [name for name in ("rebalance", "handover", "offload") if name != movement]
    ours = {"rebalance": "eplb", "handover": "kv", "offload": "cpu"}[movement]
    return {"TENSORWAY_PLUGINS": ",".join([*(f"-{name}" for name in others), f"-demo:{movement}@tensorway-{ours}"])}


# -- what it shows


def test_three_movements_are_shown_between_processes_and_every_byte_is_right(shown):
    data, _ = shown
    rows = {row["movement"]: row for row in data["movements"]}
    assert {"rebalance": 4, "handover": 5} == {name: rows[name]["processes"] for name in ("rebalance", "handover")}
    assert all(row["bytes"] > 1 << 20 and row["ratios"] and row["headline"] for row in rows.values())
    assert ("local", "local") == (rows["rebalance"]["over"], rows["handover"]["over"])
    before, after = (series["values"] for series in rows["rebalance"]["charts"][0]["series"])
    assert max(before) < 1 and all(late > early for early, late in zip(before, after, strict=True))
    (chart,) = rows["offload"]["charts"]
    found = chart["series"][0]["values"]
    assert sorted(found) == found and found[0] < found[-1] <= chart["series"][-1]["values"][0]


def test_the_report_has_the_numbers_of_the_json(shown):
    data, path = shown
    assert path.name == data["report"]
    tables = Tables()
    tables.feed(path.read_text("utf-8"))
    expected = [chart for row in data["movements"] for chart in row["charts"]]
    assert len(expected) == len(tables.found) >= 4
    for chart, table in zip(expected, tables.found, strict=True):
        assert [chart["along"], *(series["name"] for series in chart["series"])] == table[0]
        assert chart["places"] == [line[0] for line in table[1:]]
        for at, series in enumerate(chart["series"], 1):
            assert series["values"] == [float(line[at].replace(",", "")) for line in table[1:]]
    text = re.sub(r"<[^>]+>", "", path.read_text("utf-8")).replace("&times;", "x")
    for row in data["movements"]:
        for ratio in row["ratios"]:
            assert f"{ratio['what']}: {ratio['ratio']:g} x the time of {ratio['beside']}" in text


class Tables(html.parser.HTMLParser):
    """What the cells of all tables hold."""

    def __init__(self):
        super().__init__()
        self.found, self.cell = [], False

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.found.append([])
        elif tag == "tr":
            self.found[-1].append([])
        elif tag in ("td", "th"):
            self.cell = True
            self.found[-1][-1].append("")

    def handle_endtag(self, tag):
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.cell:
            self.found[-1][-1][-1] += data


def test_the_report_needs_nothing_else_and_says_how_it_was_made(shown):
    data, path = shown
    text = path.read_text("utf-8")
    for never in ("http", "<script", "<link", "src=", "url(", "@import"):
        assert never not in text
    for said in (data["command"], data["date"], data["machine"]["system"], f"tensorway {data['tensorway']}"):
        assert said in text
    assert "tensorway demo --quick --backend local" == data["command"].removesuffix(" --json")
    assert os.uname().nodename not in text, "the machine's own name is nobody's business"


def test_text_has_a_table_and_fits_a_terminal(folder):
    brings(folder, "offload", GOOD.format(right=True))
    done = folder.run(*QUICK, **only("offload"))
    assert exits.OK == done.returncode
    assert "5/5 offload: as acme-demo 1.0 shows it\n    half of it\n    It <moved>.\n" in done.stdout
    assert re.search(r"^offload +acme +2 +1\.0 MiB  right  0\.5 x a memmove$", done.stdout, re.MULTILINE)
    assert [] == [line for line in done.stdout.splitlines() if len(line) > 80]
    assert "\x1b" not in done.stdout and "\r" not in done.stdout


def test_on_a_terminal_one_line_is_rewritten(folder):
    brings(folder, "offload", GOOD.format(right=True))
    ours, theirs = pty.openpty()
    environment = folder.environment(TERM="xterm", NO_COLOR="", **only("offload"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorway", *QUICK], cwd=folder.path, env=environment, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    data, until = b"", time.monotonic() + 100
    while time.monotonic() < until and select.select([ours], [], [], until - time.monotonic())[0]:
        try:
            data += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert 0 == process.wait(10)
    assert "\r[########........] half of it\x1b[K\r\x1b[K" in data.decode()


def test_lines_of_several_transports_are_in_one_chart(folder):
    line = "(Series('before', (1.0,)), Series(stage.transport, (2.0,)))"
    brings(folder, "rebalance", GOOD.format(right=True).replace("(Series('one', (1.0, 2.34567)),)", line))
    data, code = folder.answer("demo", "--backend", "all", **only("rebalance"))
    shown = [row["over"] for row in data["movements"] if row["state"] == "right"]
    assert exits.OK == code and "local" in shown
    text = (folder.path / "tensorway-demo.html").read_text("utf-8")
    assert 1 == text.count("<h3>A &lt;chart&gt;</h3>") and "<script" not in text
    for name in ("before", *shown):
        assert 1 == text.count(f"<th>{name}</th>")


# -- what is not there


@pytest.mark.parametrize(("movement", "extra"), [("rebalance", "eplb"), ("handover", "kv"), ("offload", "cpu")])
def test_a_movement_that_nothing_shows_says_how_to_get_it(folder, movement, extra):
    for other in {"rebalance", "handover", "offload"} - {movement}:
        brings(folder, other, GOOD.format(right=True), f"acme-{other}")
    code = "import sys; from tensorway import cli, plugins; the_host = plugins.host(); "
    code += "the_host.demos = tuple(row for row in the_host.demos if row.dist.startswith('acme-')); "
    done = folder.python("-c", f"{code}sys.exit(cli.main({list(QUICK)}))")
    assert exits.OK == done.returncode
    assert f'nothing here shows it. Install what does: pip install "tensorway[{extra}]"\n' in done.stdout


def test_with_nothing_to_show_the_exit_code_says_so_and_there_is_no_report(folder):
    data, code = folder.answer("demo", **ALONE)
    assert (exits.UNAVAILABLE, "") == (code, data["report"])
    assert {"missing"} == {row["state"] for row in data["movements"]}
    assert [] == list(folder.path.glob("*.html"))
    text = folder.run("demo", **ALONE).stdout
    assert 3 == text.count("nothing here shows it. Change TENSORWAY_PLUGINS to use it.")


def test_without_a_transport_what_needs_none_is_shown(folder):
    brings(folder, "offload", GOOD.format(right=True))
    brings(folder, "rebalance", "raise AssertionError", "acme-rebalance")
    left_out = ["demo:offload@tensorway-cpu", "demo:rebalance@tensorway-eplb", "handover"]
    left_out += [f"transport:{name}" for name in ("local", "nixl", "mooncake", "rixl")]
    data, code = folder.answer("demo", TENSORWAY_PLUGINS=",".join(f"-{name}" for name in left_out))
    states = {row["movement"]: row["state"] for row in data["movements"]}
    assert (exits.OK, {"rebalance": "missing", "handover": "missing", "offload": "right"}) == (code, states)
    assert "No transport can be used here." == data["movements"][0]["error"]["true"]


def test_two_dists_that_show_one_movement_are_a_conflict_and_the_others_are_shown(folder):
    brings(folder, "handover", GOOD.format(right=True), "acme-one")
    brings(folder, "handover", GOOD.format(right=True), "acme-two")
    brings(folder, "offload", GOOD.format(right=True), "acme-offload")
    left_out = "-demo:offload@tensorway-cpu,-demo:handover@tensorway-kv,-rebalance"
    data, code = folder.answer(*QUICK, TENSORWAY_PLUGINS=left_out)
    states = [row["state"] for row in data["movements"]]
    assert (exits.UNAVAILABLE, ["missing", "failed", "right"]) == (code, states)


def test_a_transport_that_cannot_says_so_and_is_no_failure(folder):
    brings(folder, "handover", "raise Unsupported('It was asked.', 'It cannot notify.', 'Take another.')")
    brings(folder, "offload", GOOD.format(right=True), "acme-offload")
    both = {"TENSORWAY_PLUGINS": "-rebalance,-demo:handover@tensorway-kv,-demo:offload@tensorway-cpu"}
    data, code = folder.answer(*QUICK, **both)
    row = next(row for row in data["movements"] if row["movement"] == "handover")
    assert (exits.OK, "unsupported", "It cannot notify.") == (code, row["state"], row["error"]["true"])


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["--backend", "nobody"], exits.NOT_FOUND, "BackendNotFound"),
        (["--report", "no/such/folder.html"], exits.USAGE, "OptionsInvalid"),
        (["--report", "."], exits.USAGE, "OptionsInvalid"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_starts(folder, words, code, error):
    done = folder.run("demo", *words)
    assert (code, 3) == (done.returncode, len(done.stderr.splitlines()))
    assert done.stderr.startswith(f"{error}: ") and "3/5" not in done.stdout


@pytest.mark.parametrize("seconds", ["0", "nan", "-1", "1e9"])
def test_a_deadline_that_is_none_is_usage(folder, seconds):
    done = folder.run("demo", "--deadline", seconds)
    assert (exits.USAGE, True) == (done.returncode, "usage: tensorway demo" in done.stderr)


# -- what goes wrong


def test_bytes_that_are_not_right_are_said_everywhere(folder):
    brings(folder, "offload", GOOD.format(right=False))
    data, code = folder.answer(*QUICK, **only("offload"))
    assert (exits.BROKEN, "wrong") == (code, data["movements"][-1]["state"])
    assert "not every byte is right" in (folder.path / "tensorway-demo.html").read_text("utf-8")
    assert "WRONG" in folder.run(*QUICK, **only("offload")).stdout


#: What spoils a byte of a movement, in whichever of its processes imports it.
SPOILS = {
    "rebalance": """
        from tensorway_eplb.testing import engine
        before = engine.TestEngine.commit
        def commit(self, layer, experts, write):
            before(self, layer, experts, write)
            self.weights[layer][0][0][-1] ^= 1
        engine.TestEngine.commit = commit
    """,
    "handover": """
        from tensorway_kv.reference import model
        made, before = model.Shard.__init__, model.Shard.projected
        def make(self, shape, rank=0, ranks=1):
            made(self, shape, rank, ranks)
            self.spoilt = ranks == 2 and rank == 1
        def projected(self, layer, hidden):
            queries, keys, values = before(self, layer, hidden)
            if self.spoilt and len(values) > 1:
                values[3] += 2.0
            return queries, keys, values
        model.Shard.__init__, model.Shard.projected = make, projected
    """,
    "offload": """
        from tensorway_cpu import engine
        before = engine.Offloading.load
        def load(self, keys, pages, *more):
            return before(self, keys[:-1], pages[:-1], *more) + 1
        engine.Offloading.load = load
    """,
}


@pytest.mark.parametrize("movement", SPOILS)
def test_a_byte_that_is_spoilt_on_the_way_is_noticed(folder, movement):
    there(movement)
    # Python imports this first in every process; what else would be of that name is of no use here.
    (folder.path / "sitecustomize.py").write_text(textwrap.dedent(SPOILS[movement]))
    others = ",".join(f"-{name}" for name in SPOILS if name != movement)
    data, code = folder.answer(*QUICK, TENSORWAY_PLUGINS=others)
    states = {row["movement"]: row["state"] for row in data["movements"]}
    assert (exits.BROKEN, "wrong") == (code, states[movement]), data


@pytest.mark.parametrize(
    ("body", "words"), [("return 1", "returned no Shown"), ("raise OSError('no such file')", "raised OSError")]
)
def test_a_part_that_is_broken_is_its_dist_s_defect_and_others_are_shown(folder, body, words):
    brings(folder, "rebalance", body)
    brings(folder, "offload", GOOD.format(right=True), "acme-offload")
    both = {"TENSORWAY_PLUGINS": "-handover,-demo:rebalance@tensorway-eplb,-demo:offload@tensorway-cpu"}
    data, code = folder.answer(*QUICK, **both)
    states = [row["state"] for row in data["movements"]]
    error = data["movements"][0]["error"]
    assert (exits.BROKEN, ["failed", "missing", "right"]) == (code, states)
    assert ("PluginDefect", True) == (error["error"], "acme-demo" in error["true"] and words in error["true"])


SLOW = """
    import time
    from tensorway_cpu import engine
    before = engine.Offloading.store
    def store(self, *given):
        time.sleep(10)
        return before(self, *given)
    engine.Offloading.store = store
"""
#: What a line of the demo says when processes of a movement are at work, and what brings it.
AT_WORK = {
    "rebalance": ("every rank moves", "tensorway_eplb"),
    "handover": ("prompts of", "tensorway_kv"),
    "offload": ("an engine stores", "tensorway_cpu"),
}


def there(movement):
    """Skip where its dist is not installed; in the gate's own session that is a failure."""
    module = AT_WORK[movement][1]
    if importlib.util.find_spec(module) is None:
        text = f"{module.replace('_', '-')} is not installed: pip install it"
        (pytest.fail if "TENSORWAY_TEST_LIBRARY" in os.environ else pytest.skip)(text)


def at_work(folder, movement, *more):
    """A run that shows nothing else, and the processes that are at work for it."""
    there(movement)
    line = AT_WORK[movement][0]
    if movement == "offload":  # which is over before a test has seen it
        (folder.path / "sitecustomize.py").write_text(textwrap.dedent(SLOW))
    others = ",".join(f"-{name}" for name in AT_WORK if name != movement)
    # Not quick, so that it goes on for longer than a test needs to see it.
    process = folder.start("demo", "--backend", "local", *more, TENSORWAY_PLUGINS=others)
    said = ""
    for text in process.stdout:
        said += text
        if line in text:
            until = time.monotonic() + 30
            while not (found := ranks_below(process)):  # the line comes first
                assert time.monotonic() < until, "it has started no process"
            return process, found
    raise AssertionError(f"it never came to {line!r}:\n{said}{process.stderr.read()}")


def ended(process, seconds):
    """Exit code and the rest of its output."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in out + err, err
    return process.returncode, out


@pytest.mark.parametrize("movement", AT_WORK)
def test_a_process_that_dies_in_the_middle_is_three_lines_and_an_exit_code(folder, movement):
    process, victims = at_work(folder, movement)
    os.kill(victims[-1], signal.SIGKILL)
    started = time.monotonic()
    code, out = ended(process, 60)
    assert exits.UNAVAILABLE == code, out
    assert time.monotonic() - started < 50
    title = {"rebalance": "A rebalance", "handover": "A hand-over", "offload": "Offloading"}[movement]
    assert re.search(rf"^    \w+: {title} was to be shown\.\n      .+\n", out, re.MULTILINE)
    assert re.search(rf"^{'hand over' if movement == 'handover' else movement} .* failed$", out, re.MULTILINE)
    gone(victims)


def test_a_process_that_stands_still_ends_with_the_deadline(folder):
    process, victims = at_work(folder, "rebalance", "--deadline", "20")
    os.kill(victims[-1], signal.SIGSTOP)
    code, out = ended(process, 60)
    assert exits.UNAVAILABLE == code, out
    assert "A rebalance was to be shown." in out
    gone(victims)


@pytest.mark.parametrize("movement", AT_WORK)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_demo_however_that_ends(folder, movement, number):
    process, started = at_work(folder, movement)
    process.send_signal(number)
    code, _ = ended(process, 60)
    expected = {signal.SIGINT: exits.INTERRUPTED, signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGKILL: -signal.SIGKILL}
    assert expected[number] == code
    gone(started)


def gone(pids, seconds=30.0):
    """All of them have ended."""
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if b"tensorway.testing.ranks" in command_of(pid)]:
        assert time.monotonic() < until, f"processes {left} are left"
        time.sleep(0.05)


def test_every_schema_is_valid_and_used():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(SCHEMAS)
    assert ["tensorway.demo/1"] == [name for name in SCHEMAS["$defs"] if name.startswith("tensorway.")]
    assert json.dumps(SCHEMAS)
