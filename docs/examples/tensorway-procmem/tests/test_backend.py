"""The backend as an engine gets it: by name, from the host. The dist must be installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorway
from tensorway.errors import Closed, DescriptionInvalid, OptionsInvalid, PeerLost
from tensorway.transport import Transport
from tensorway.transport.contract import Description

from tensorway_procmem import probe
from tensorway_procmem.backend import ProcmemFabric
from tensorway_procmem.options import ProcmemTransportOptions

KIND, NAME = "transport", "procmem"


def test_it_is_chosen_when_it_is_asked_for() -> None:
    # `tensorway why transport procmem` prints this decision.
    decision = tensorway.decide(KIND, NAME)
    assert decision.winner is not None, decision.losers
    assert decision.winner.name == NAME


def test_the_host_constructs_it() -> None:
    with tensorway.create(KIND, NAME) as transport:
        assert transport.name == NAME
        assert transport.describe()
    with pytest.raises(Closed):
        transport.describe()


def test_options_reach_it() -> None:
    with tensorway.create(KIND, NAME, {"name": "engine-1"}) as transport:
        assert transport.endpoint_name == "engine-1"


@pytest.mark.parametrize("options", [{"nmae": "engine-1"}, {"name": 1}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionsInvalid, match="name"):
        tensorway.create(KIND, NAME, options)


def test_it_closes_twice_without_harm() -> None:
    transport = tensorway.create(KIND, NAME)
    transport.close()
    transport.close()


def test_who_is_not_there_any_more_is_a_typed_error() -> None:
    with tensorway.create(KIND, NAME) as transport, tensorway.create(KIND, NAME) as other:
        gone: Transport = other
        description = gone.describe()
        gone.close()
        with pytest.raises(PeerLost, match=gone.endpoint_name):
            transport.connect(description, deadline=5)


def test_a_machine_that_does_not_allow_it_is_an_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scope = tmp_path / "ptrace_scope"
    scope.write_text("1\n", "ascii")
    monkeypatch.setattr(probe, "SCOPE", scope)
    monkeypatch.setattr(probe.os, "geteuid", lambda: 1000)
    result = probe.probe()
    assert not result.usable
    assert "ptrace_scope 1" in result.reason
    assert "kernel.yama" in result.remedy


def test_what_a_stranger_says_opens_no_file_of_his_choice(tmp_path: Path) -> None:
    with tensorway.create(KIND, NAME) as transport:
        fabric = ProcmemFabric(ProcmemTransportOptions())
        bad = Description(NAME, "stranger", "../../etc/passwd", (), bytes(12))
        with pytest.raises(DescriptionInvalid):
            fabric.connect(bad, 1.0)
        assert transport.describe()
