"""What the host costs: one scan per process, nothing at import, no pluggy after construction."""

from __future__ import annotations

import json
import time

from tensorway import plugins
from tensorway.types import Offer, ProbeResult

#: Installs a finder that counts how often the installed dists are walked, before anything of ours runs.
COUNT_WALKS = """
import sys
class Counter:
    walks = 0
    def find_distributions(self, context=None):
        if context is None or context.name is None:
            Counter.walks += 1
        return iter(())
    def find_spec(self, *args):
        return None
sys.meta_path.insert(0, Counter())
"""


def test_import_loads_no_plugin_no_library_and_scans_nothing(site):
    site.good("alpha")
    code = COUNT_WALKS + "import tensorway, json; print(json.dumps([sorted(sys.modules), Counter.walks]))"
    modules, walks = json.loads(site.python(code).stdout)
    tops = {name.partition(".")[0] for name in modules}
    assert 0 == walks
    unwanted = {
        "torch",
        "numpy",
        "nixl",
        "nixl_cu12",
        "rixl",
        "pluggy",
        "attrs",
        "attr",
        "msgspec",
        "zmq",
        "importlib_metadata",
        "alpha_dist",
    }
    assert set() == tops & unwanted
    assert {"tensorway"} == {name for name in tops if name.startswith("tensorway")}


def test_import_costs_less_than_three_imports_of_pluggy(site):
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"

    # In turns: what else the machine has to do comes and goes, and must not meet one of them alone.
    imports = ["tensorway, tensorway.plugins", "pluggy, attrs", "tensorway", "pluggy"]
    rounds = [[float(site.python(code.format(module)).stdout) for module in imports] for _ in range(7)]
    ours, theirs, bare, pluggy = (min(times) for times in zip(*rounds, strict=True))
    assert bare < 3 * pluggy, f"import tensorway took {bare / pluggy:.2f} of import pluggy"
    assert ours < 3 * theirs, f"the host took {ours / theirs:.2f} of what it stands on"


def test_two_hundred_dists_are_walked_once_for_all_questions(site):
    for number in range(200):
        site.dist(f"other-{number}", {"console_scripts": {f"x{number}": "y:z"}}, api=None)
    for name in ("alpha", "beta"):
        site.good(name)
    code = (
        COUNT_WALKS
        + """
import json, time, tensorway
from tensorway import plugins
started = time.perf_counter(); plugins.host(); first = time.perf_counter() - started
seconds = []
for turn in range(5):  # the best of some: nobody else is to be measured
    started = time.perf_counter()
    for kind in ("transport", "offloading", "platform"): plugins.host().slots(kind)
    seconds.append(time.perf_counter() - started)
second = min(seconds)
tensorway.create("transport", "alpha"); tensorway.create("transport", "beta"); tensorway.decide("transport")
print(json.dumps([Counter.walks, first, second]))
"""
    )
    walks, first, second = json.loads(site.python(code).stdout)
    assert 1 == walks
    assert second < first / 20, f"asking again cost {second / first:.3f} of the scan"


def test_no_hook_is_called_after_construction():
    class Backend:
        def __init__(self) -> None:
            self.moved = 0

        def move(self, blocks: int) -> int:
            self.moved += blocks
            return self.moved

    offer = Offer(
        name="x",
        kind="transport",
        summary="A test.",
        probe=lambda: ProbeResult.passed("yes"),
        probe_in="host",
        factory=lambda options, context: Backend(),
    )
    with plugins.isolated([offer]) as host:
        calls: list[str] = []
        undo = host.manager.add_hookcall_monitoring(
            before=lambda name, impls, kwargs: calls.append(name), after=lambda *args: None
        )
        backend = host.create("transport")
        assert calls, "construction by auto asks the hook; else this test watches nothing"
        del calls[:]
        for _ in range(1000):
            backend.move(1)
        undo()
        assert ([], 1000) == (calls, backend.moved)


def test_a_remembered_decision_costs_far_less_than_the_probe_behind_it(site):
    site.good("alpha", probe_in="child")
    host = site.host()
    started = time.perf_counter()
    host.decide("transport")
    first = time.perf_counter() - started
    again = []
    for _ in range(5):
        started = time.perf_counter()
        host.decide("transport")
        again.append(time.perf_counter() - started)
    assert min(again) < first / 10
