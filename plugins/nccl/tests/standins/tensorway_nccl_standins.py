"""The session of `nccl` over libraries that need no device: what offers them to the processes of a test.

`nccl-over-gloo` is the lane `torch` with torch's own gloo instead of its NCCL; `nccl-over-a-stand-in` is the lane
`direct` with `standin.c`, which is not NCCL. Everything else is what an engine gets.
"""

from __future__ import annotations

import os
from datetime import timedelta

from tensorway.types import Offer, ProbeResult
from tensorway_nccl.options import NcclOptions

HOST = frozenset({"cpu"})


def _offer(name, factory):
    return Offer(
        name=name,
        kind="eplb_communicator",
        summary="For tests.",
        probe=lambda: ProbeResult.passed("it is a stand-in"),
        probe_in="host",
        factory=factory,
        options=NcclOptions,
        devices=HOST,
        priority=0,
    )


def over_a_stand_in(ctx):
    return _offer("nccl-over-a-stand-in", construct_stand_in)


def construct_stand_in(options, context):
    import ctypes

    from tensorway_nccl import direct
    from tensorway_nccl.direct_lane import DirectLane
    from tensorway_nccl.runtime import Runtime
    from tensorway_nccl.session import NcclSession

    path = os.environ["STANDIN_LIBRARY"]
    lane = DirectLane(direct.load(path), Runtime(ctypes.CDLL(path), "cuda", 0), options.max_ctas, HOST)
    return NcclSession(options, context, lane)


def over_gloo(ctx):
    return _offer("nccl-over-gloo", construct_over_gloo)


def construct_over_gloo(options, context):
    from tensorway_nccl.session import NcclSession

    return NcclSession(options, context, gloo_lane(options.timeout_s))


def gloo_lane(seconds):
    import torch

    from tensorway_nccl.torch_lane import TorchLane, TorchPair, dist

    class GlooPair(TorchPair):
        """What gloo has otherwise: no coalescing, no streams, and it tells only who waits that something is complete.

        Each wait is cut off by another that times out, which closes the group's connections.
        """

        coalesces = False
        abort_releases = True

        def _process_group(self, store):
            options = dist.ProcessGroupGloo._Options()
            options._timeout = timedelta(seconds=self._seconds)
            options._threads = 1
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            return dist.ProcessGroupGloo(store, self._rank, 2, options)

        def _batch(self, sends, receives):
            works = super()._batch(sends, receives)
            # A message that is half on its way when the other dies is waited for, for ever: unless the group is cut.
            end = self._group.recv([torch.empty(0, dtype=torch.uint8)], 1 - self._rank, 1)
            works.append(self._group.send([torch.empty(0, dtype=torch.uint8)], 1 - self._rank, 1))
            return [end, *works]

        def _current(self):
            import contextlib

            return contextlib.nullcontext()

        def _completed(self, work):
            work.wait(timedelta(days=1))
            return True

        def _watch(self, works):
            return lambda: True

        def _abort(self):
            with self._aborting:
                if self._group is None:
                    return
                try:
                    nothing = torch.empty(0, dtype=torch.uint8)
                    self._group.recv([nothing], 1 - self._rank, 2).wait(timedelta(milliseconds=1))
                except RuntimeError:
                    pass  # that is how it is cut

    class GlooLane(TorchLane):
        devices = HOST

        def prepare(self):
            """gloo ends no process."""

        def _pair(self, peer, invitation, rank):
            return GlooPair(peer, invitation, rank, self._device, self._seconds)

    return GlooLane("cpu", seconds)
