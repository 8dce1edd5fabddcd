"""A few of the random lives of `tensorway_vllm.testing.lives`, each with its seed. Needs vLLM, and no model."""

from __future__ import annotations

import random
import warnings

import pytest

with warnings.catch_warnings():  # those of importing vLLM are not ours
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm.v1.core.sched.scheduler", reason="needs vLLM", exc_type=ImportError)
    from tensorway_vllm.testing.hollow import Rank
    from tensorway_vllm.testing.lives import campaign
    from tensorway_vllm.testing.scheduling import Engine


@pytest.mark.parametrize("which", ["handover", "offload"])
@pytest.mark.parametrize("seed", [7, 1007])
def test_lives_of_these_seeds_end_well(seed, which):
    happened = campaign(seed, 3, (which,))
    assert happened["lives"] == 3 and happened["length"] > 20


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", ["handover", "offload"])
def test_lives_of_any_seed_end_well(which):
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"python -m tensorway_vllm.testing.lives --seed {seed} --count 30 --which {which}")
    happened = campaign(seed, 30, (which,))
    assert happened["loaded"] > 0


def test_a_life_in_which_a_page_is_wrong_is_told_with_its_seed(monkeypatch):
    compute, steps = Rank._compute, []

    def wrong(self, name, start, count):
        steps.append(name)
        if len(steps) == 40:
            self._groups[0][0][0][:] += 1
        return compute(self, name, start, count)

    monkeypatch.setattr(Rank, "_compute", wrong)
    with pytest.raises(AssertionError, match="life 3 of offload: WrongPages"):
        campaign(3, 1, ("offload",))


def test_a_life_in_which_a_block_is_lost_is_told_with_its_seed(monkeypatch):
    leaks = Engine.leaks
    monkeypatch.setattr(Engine, "leaks", lambda self: leaks(self) or "blocks: 1")
    with pytest.raises(AssertionError, match=r"life 3 of offload: AssertionError: \['blocks: 1'\]"):
        campaign(3, 1, ("offload",))
