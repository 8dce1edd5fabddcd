"""The backend as users meet it first: chosen by its name, its options checked. The dist must be installed."""

from __future__ import annotations

import pytest
import tensorway
from tensorway.errors import OptionsInvalid
from tensorway.offload import TierContext

from tensorway_sqlite import probe

KIND, NAME = "offload_tier", "sqlite"


def test_it_is_chosen_when_it_is_asked_for() -> None:
    # `tensorway why offload_tier sqlite` prints this decision.
    decision = tensorway.decide(KIND, NAME)
    assert decision.winner is not None, decision.losers
    assert decision.winner.name == NAME


@pytest.mark.parametrize("options", [{"max_byte": 5}, {"max_bytes": "all"}, {"max_bytes": 0}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionsInvalid, match="max_bytes"):
        tensorway.create(KIND, NAME, options)


def test_a_missing_library_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LIBRARY", "no_such_library")
    result = probe.probe()
    assert not result.usable
    assert "no_such_library" in result.reason
    assert "no_such_library" in result.remedy


def test_a_tier_without_a_file_is_refused() -> None:
    with pytest.raises(OptionsInvalid, match="path"):
        tensorway.create(KIND, NAME, {}, TierContext("engine", b"fingerprint", [4096]))
