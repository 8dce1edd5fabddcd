"""Expert weights moved in vLLM by Tensorway's communicators, beside vLLM's own: the same moves, in the same processes.

    python tests/bench/vllm_eplb.py [--short] [--wide 2000] [--layers 6] [--rounds 7]

Needs vLLM, `tensorway[eplb]` and `tensorway[gloo]`. Three ranks hold weights in host memory, and vLLM's mover runs as
`tensorway_vllm.testing.experts` says. vLLM's own is its communicator over torch's gloo. Each round makes the same
rearrangement by each of them in turn; what is printed are medians of the slowest rank's seconds, and ratios of rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile

from tensorway.testing.ranks import Place, Ranks

RANKS = 3
PATIENCE = 600.0
VARIANTS = {
    "vLLM's own": {},
    "onesided": {"tensorway": {"eplb": {"communicator": "onesided", "options": {"transport": "local"}}}},
    "gloo": {"tensorway": {"eplb": {"communicator": "gloo"}}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", type=int, default=2000, help="bytes of an expert in a layer, in 340 (default: 2000)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--short", action="store_true", help="two rounds")
    given = parser.parse_args()
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed here: nothing to measure. pip install tensorway[vllm,eplb,gloo], and vLLM")
        return
    from tensorway_vllm.testing import experts

    rounds = 2 if given.short else given.rounds
    with Ranks(RANKS) as world, tempfile.TemporaryDirectory() as folder:
        members = tuple(f"p{index}" for index in range(RANKS))
        for index in range(RANKS):
            world[index].start(experts.enter, Place("/bench", members, index), folder)
        for index in range(RANKS):
            world[index].result(PATIENCE)
        for name, additional in VARIANTS.items():
            print(name, world.each(range(RANKS), experts.make, name, additional, 5, given.layers, given.wide))
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for seed in range(rounds + 1):
            digests = set()
            for name in VARIANTS:
                told = world.each(range(RANKS), experts.rearrange, name, seed, seconds=PATIENCE)
                assert not any(each.error for each in told), told
                digests.add(tuple(each.digest for each in told))
                if seed:  # the first touches the memory
                    seconds[name].append(max(each.seconds for each in told))
            assert len(digests) == 1, "weights differ"
    own = seconds["vLLM's own"]
    for name, took in seconds.items():
        ratio = statistics.median(mine / its for mine, its in zip(own, took, strict=True))
        print(f"{name:<12} {1e3 * statistics.median(took):8.1f} ms   vLLM's own takes {ratio:5.2f} times as long")


if __name__ == "__main__":
    main()
