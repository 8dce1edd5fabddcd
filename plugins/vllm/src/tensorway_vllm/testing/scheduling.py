"""vLLM's own engine core, scheduler and cache manager, with our connectors, and no model: a step takes a millisecond.

May import vllm, and the core. `Engine` is one engine, whose executor is `hollow`; `Pair` is two of them that hand over.
Everything between the request and the pages is vLLM's and ours; what stands in is the arithmetic of a model, and it
looks at each page that a request attends to.
"""

from __future__ import annotations

import functools
import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

import tensorway
from tensorway.testing.faults import FaultyFabric
from tensorway_vllm.testing.faulty import FaultyFabrics
from tensorway_vllm.testing.hollow import Hollow, Rank

#: Seconds that anything here may take; only a defect takes them.
PATIENCE: Final = 60.0
_PAUSE: Final = 0.0005
_names = itertools.count()


@attrs.define
class Said:
    """What a client was told of its request."""

    tokens: list[int] = attrs.field(factory=list)
    #: Why it ended: `stop`, `length`, `abort`, `error`; empty while it has not.
    reason: str = ""
    #: What the next engine is to be given.
    params: dict[str, Any] | None = None
    #: Tokens of its prompt that came from elsewhere, and those that the engine had itself.
    external: int = 0
    cached: int = 0


class Engine:
    """One engine, which is stepped by the test."""

    def __init__(
        self,
        model: Path,
        kv: Mapping[str, Any] | None,
        *,
        pages: int = 32,
        page_tokens: int = 16,
        ranks: int = 1,
        kind: str = "llama",
        layouts: Sequence[str] = ("LBHNC",),
        **more: Any,
    ) -> None:
        """`pages`: of all layers; one of them is vLLM's own null block. `more`: what vLLM's `EngineArgs` takes."""
        options: dict[str, Any] = {
            "max_model_len": (pages - 2) * page_tokens,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 128,
            "dtype": "float32",
            "async_scheduling": False,
            "disable_log_stats": False,
            **more,
        }
        executor = functools.partial(
            Hollow, ranks=ranks, kind=kind, page_tokens=page_tokens, supported=list(layouts), room=pages
        )
        config = EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=page_tokens,
            tensor_parallel_size=ranks,
            distributed_executor_backend=Hollow,
            kv_transfer_config=dict(kv) if kv is not None else None,
            **options,
        ).create_engine_config()
        self.core = EngineCore(config, executor, log_stats=True)
        self.said: dict[str, Said] = {}
        self.steps = 0
        self._before_update: list[Callable[[], None]] = []
        #: Of blocks that no request holds, before the first one came.
        self.blocks = self.free

    @property
    def scheduler(self) -> Any:
        """vLLM's."""
        return self.core.scheduler

    @property
    def connector(self) -> Any:
        """The scheduler's side of the connector."""
        return self.scheduler.connector

    @property
    def ranks(self) -> list[Rank]:
        """The workers."""
        executor: Any = self.core.model_executor
        found: list[Rank] = executor.ranks
        return found

    @property
    def free(self) -> int:
        """Blocks that no request holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def add(
        self,
        prompt: Sequence[int],
        count: int = 4,
        params: Mapping[str, Any] | None = None,
        name: str = "",
        **more: Any,
    ) -> str:
        """A request; its name. `params`: `kv_transfer_params` as the client sends them."""
        name = name or f"r{next(_names)}"
        extra = {"kv_transfer_params": params} if params is not None else None
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, extra_args=extra)
        fields: dict[str, Any] = dict.fromkeys(
            ("mm_features", "pooling_params", "lora_request", "cache_salt", "data_parallel_rank")
        )
        fields.update(more)
        request = EngineCoreRequest(
            request_id=name, prompt_token_ids=list(prompt), sampling_params=how, arrival_time=time.time(), **fields
        )
        self.said[name] = Said()
        self.core.add_request(*self.core.preprocess_add_request(request))
        return name

    def abort(self, name: str, *, computing: bool = False) -> None:
        """The client does not want it any more; `computing`: which the engine hears in the midst of its next step."""
        if computing:
            self.core.aborts_queue.put_nowait([name])
        else:
            self.core.abort_requests([name])
        self.said[name].reason = self.said[name].reason or "abort"

    def step(self) -> bool:
        """One step, as vLLM's loop has it; whether anything was computed."""
        step: Any = self.core.step_fn
        outputs, computed = step()
        self.core.post_step(computed)
        self.steps += 1
        for each in (outputs or {}).values():
            for output in each.outputs:
                said = self.said[output.request_id]
                said.tokens += output.new_token_ids
                said.params = output.kv_transfer_params or said.params
                if output.prefill_stats is not None:
                    said.external = output.prefill_stats.num_external_cached_tokens
                    said.cached = output.prefill_stats.num_local_cached_tokens
                if output.finish_reason is not None:
                    said.reason = str(output.finish_reason)
        if not computed:
            time.sleep(_PAUSE)
        return bool(computed)

    def status(self, name: str) -> str:
        """What vLLM's scheduler says of a request; `gone` if it does not know it."""
        request = self.scheduler.requests.get(name)
        return request.status.name if request is not None else "gone"

    def parked(self, name: str) -> bool:
        """Whether its pages are on their way."""
        return bool(self.status(name) == RequestStatus.WAITING_FOR_REMOTE_KVS.name)

    @property
    def busy(self) -> bool:
        """Whether vLLM's loop goes on."""
        return bool(self.scheduler.has_requests()) or bool(self.core.batch_queue)

    def run(self, *names: str) -> list[Said]:
        """Until these have ended, or all of them."""
        until(lambda: all(self.said[name].reason for name in names or self.said), self)
        return [self.said[name] for name in names]

    def forget(self) -> None:
        """Let vLLM's own prefix cache be empty."""
        assert self.scheduler.reset_prefix_cache()

    def leaks(self) -> str:
        """What is still held by somebody although nobody should; empty if nothing is."""
        scheduler = self.scheduler
        held = {
            "requests": list(scheduler.requests),
            "running": len(scheduler.running),
            "waiting": len(scheduler.waiting) + len(getattr(scheduler, "kv_holding_waiting", ())),  # not in 0.30
            "blocks": self.blocks - self.free,
            "loads": [*scheduler.finished_recving_kv_req_ids, *scheduler.failed_recving_kv_req_ids],
        }
        return ", ".join(f"{what}: {count}" for what, count in held.items() if count)

    def close(self) -> None:
        """End both sides."""
        self.core.model_executor.shutdown()
        self.scheduler.shutdown()


def until(condition: Callable[[], object], *engines: Engine, seconds: float = PATIENCE) -> None:
    """Step engines until something is true."""
    last = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > last:
            raise AssertionError("; ".join(f"{one.said}, {one.leaks()}" for one in engines))
        for one in engines:
            one.step()


def settled(*engines: Engine, seconds: float = PATIENCE) -> None:
    """Step engines until vLLM's loop would rest."""
    until(lambda: not any(one.busy for one in engines), *engines, seconds=seconds)


def offloads(
    connector: str = "TensorwayOffloadingConnector",
    *,
    policy: str = "recompute",
    capacity: int = 256,
    tiers: Sequence[Mapping[str, Any]] = (),
    **extra: Any,
) -> dict[str, Any]:
    """A `kv_transfer_config` that offloads; `extra`: what vLLM reads itself beside the spec's options."""
    options = {"capacity_blocks": capacity, "pin": False, "tiers": [dict(tier) for tier in tiers]}
    return {
        "kv_connector": connector,
        "kv_role": "kv_both",
        "kv_load_failure_policy": policy,
        "kv_connector_extra_config": {"spec_name": "TensorwayOffloadingSpec", "options": options, **extra},
    }


class Meeting:
    """Where engines of this process meet, and the configuration of the connector that hands over between them."""

    def __init__(self, **options: Any) -> None:
        secret = secrets.token_hex(16)
        self._where: Any = tensorway.create("rendezvous", "direct", {"secret": secret})
        self.address: str = self._where.address
        self._meet = {
            "rendezvous": "direct",
            "rendezvous_options": {"address": self.address, "secret": secret},
        }
        self._options = {"transport": "local", "secret": secret, "deadline": 10.0, "presence": 5.0, **options}

    def config(self, name: str, policy: str = "recompute", role: str = "kv_both", **options: Any) -> dict[str, Any]:
        """A `kv_transfer_config`; `options`: of the backend."""
        return {
            "kv_connector": "TensorwayConnector",
            "kv_connector_module_path": "tensorway_vllm.handover",
            "kv_role": role,
            "kv_load_failure_policy": policy,
            "engine_id": name,
            "kv_connector_extra_config": {**self._meet, "options": {**self._options, **options}},
        }

    def close(self) -> None:
        """End it."""
        self._where.close()


#: What a router sends to the engine that is to prefill.
WISH: Final = {"hand_over": True}


class Pair:
    """An engine that prefills and one that decodes."""

    def __init__(
        self,
        model: Path,
        meeting: Meeting,
        *,
        policy: str = "recompute",
        options: Mapping[str, Any] | None = None,
        prefill: Mapping[str, Any] | None = None,
        decode: Mapping[str, Any] | None = None,
        fabrics: FaultyFabrics | None = None,
        **both: Any,
    ) -> None:
        """`options`: of the backend; `both`, and for one of them `prefill` or `decode`: as `Engine` takes it.

        With `fabrics`, what the decoding engine reads goes wrong as `fabric` is told.
        """
        number = next(_names)
        self._fabrics, self._reader = fabrics, f"decode-{number}"
        faulty = {"transport": "faulty", "transport_options": {"of": self._reader}} if fabrics is not None else {}
        mine = meeting.config(f"prefill-{number}", policy, **(options or {}))
        self.prefill = Engine(model, mine, **{**both, **(prefill or {})})
        mine = meeting.config(self._reader, policy, **{**(options or {}), **faulty})
        self.decode = Engine(model, mine, **{**both, **(decode or {})})

    def fabric(self, rank: int = 0) -> FaultyFabric:
        """With which a rank of the decoding engine reads; it is there when the engine has been stepped."""
        assert self._fabrics is not None
        return self._fabrics.of(self._reader)[rank]

    def ticket(self, prompt: Sequence[int]) -> dict[str, Any] | None:
        """Prefill; what the decode side is to be given."""
        name = self.prefill.add(prompt, 1, WISH)
        [said] = self.prefill.run(name)
        return said.params

    def step(self) -> None:
        """Both."""
        self.prefill.step()
        self.decode.step()

    def run(self, *names: str) -> list[Said]:
        """Until the decode side has answered these."""
        until(lambda: all(self.decode.said[name].reason for name in names), self.prefill, self.decode)
        return [self.decode.said[name] for name in names]

    def settle(self) -> None:
        """Until nobody has anything to do."""
        settled(self.prefill, self.decode)

    def close(self) -> None:
        """End both."""
        self.decode.close()
        self.prefill.close()
