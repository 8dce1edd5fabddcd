"""What holds for every offer of every kind, whatever it constructs.

Room `testing`. The suites of the kinds come on top of this one; it needs no device, no peer and no native library.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import attrs
import pytest

from tensorway.plugins import Host, probing
from tensorway.plugins.slots import Slot
from tensorway.testing.suite import Suite
from tensorway.types import Offer, ProbeResult

#: Imports a plugin's hook in a fresh interpreter and tells what came with it.
_IMPORT = """
import importlib, json, sys
module, _, name = sys.argv[1].partition(":")
getattr(importlib.import_module(module), name)
maps = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(json.dumps({"modules": sorted(sys.modules), "maps": maps}))
"""


class OfferSuite(Suite):
    """Subclass it and set `kind` and `name` to those of your entry point; your dist must be installed."""

    kind: str
    name: str
    #: Your dist, if others offer the same name here.
    dist: str = ""
    #: Packages that importing your plugin must not import, beside torch and numpy: those of your library.
    native_modules: tuple[str, ...] = ()
    #: Seconds that your probe may take on a slow machine.
    probe_seconds: float = 60.0

    @pytest.fixture
    def slot(self) -> Slot:
        """The slot that discovery makes of your entry point."""
        from tensorway.plugins.scan import scan
        from tensorway.settings import Settings

        host = Host(scan(), Settings())
        slots = [slot for slot in host.slots(self.kind) if slot.declaration.name == self.name]
        slots = [slot for slot in slots if self.dist in ("", slot.declaration.dist)]
        assert len(slots) == 1, f"{len(slots)} dists declare {self.kind} {self.name!r}; install yours, and only yours"
        return slots[0]

    @pytest.fixture
    def offer(self, slot: Slot) -> Offer:
        """Your offer, loaded the way the host loads it."""
        from tensorway.hookspecs import API
        from tensorway.types import HookContext

        offer = slot.load(HookContext(api=API, core_version="0"), self.probe_seconds)
        assert offer is not None, f"it does not load: {slot.record}"
        return offer

    def test_metadata_declares_it_for_an_api_that_this_core_speaks(self, slot: Slot) -> None:
        """The host can tell from metadata alone that this plugin fits.

        *If this fails:* add `[project.entry-points."tensorway.api"]` with the entry `1 = "your_package"`, and
        reinstall.
        """
        assert slot.record is None

    def test_importing_the_plugin_loads_no_native_library(self, slot: Slot) -> None:
        """Discovery stays cheap and safe: the module of the hook imports neither torch nor numpy nor the library.

        *If this fails:* move the import into the probe or the factory, or declare a `tensorway.native.NativeLibrary`.
        """
        command = [sys.executable, "-c", _IMPORT, slot.declaration.value]
        done = subprocess.run(command, capture_output=True, text=True, timeout=self.probe_seconds, check=False)
        assert done.returncode == 0, done.stderr
        loaded = json.loads(done.stdout.splitlines()[-1])
        tops = {module.partition(".")[0] for module in loaded["modules"]}
        assert set() == tops & {"torch", "numpy", *self.native_modules}
        assert "/torch/lib/" not in loaded["maps"]

    def test_the_offer_describes_itself(self, offer: Offer) -> None:
        """A person who reads `tensorway plugins show` learns what it is for.

        *If this fails:* give `summary` one line of plain words, and `devices` the memory that it can address.
        """
        assert offer.summary.strip() == offer.summary != ""
        assert "\n" not in offer.summary
        assert set() == {device for device in offer.devices if not re.fullmatch("[a-z][a-z0-9_]*", device)}
        assert offer.priority in range(101)

    def test_the_probe_answers_within_its_deadline(self, offer: Offer) -> None:
        """Whatever this machine has, the probe says yes or no and why; it does not raise, hang or die.

        *If this fails:* the message tells how the probe ended. A library that is missing or broken is an answer.
        """
        result = probing.run(offer, self.probe_seconds).result
        assert isinstance(result, ProbeResult), result
        assert result.reason.strip() != ""
        if not result.usable:
            assert result.remedy.strip() != "", "a probe that says no says what to do about it"

    def test_options_have_defaults_and_refuse_what_they_do_not_know(self, offer: Offer, tensorway_host: Host) -> None:
        """A misspelt key is an error at start, not a setting that silently does nothing.

        *If this fails:* make `options` an attrs class; msgspec must understand the types of its fields.
        """
        from tensorway.errors import OptionsInvalid
        from tensorway.plugins.options import validated

        with pytest.raises(OptionsInvalid):
            validated(offer, {"no_such_option_of_any_backend": 1})
        required = [field.name for field in attrs.fields(offer.options) if field.default is attrs.NOTHING]
        assert required == [], "an option without a default makes `auto` impossible"
        assert isinstance(validated(offer, {}), offer.options)
