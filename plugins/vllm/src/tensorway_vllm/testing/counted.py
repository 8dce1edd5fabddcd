"""What vLLM's metrics say after movements: `python -m tensorway_vllm.testing.counted offload|handover MODEL`.

`offload`: one engine stores prompts, loses them and loads them again. `handover`: one engine that offloads, too, inside
of `MultiConnector`, hands prompts over to another, and then loads its own. The line that begins with `{"counted"` has,
in JSON, for each engine what was counted: by name, each value with its labels. May import vllm in its processes.
"""

from __future__ import annotations

import json
import multiprocessing
import secrets
import sys
from multiprocessing.connection import Connection
from typing import Any, Final

import tensorway
from tensorway.errors import DeadlineExceeded

_PREFIX: Final = "vllm:tensorway_"
_ANSWER: Final = 300.0
OFFLOADING: Final = {
    "kv_connector": "TensorwayOffloadingConnector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
    "kv_connector_extra_config": {"options": {"capacity_blocks": 128}},
}


def counted(llm: Any) -> dict[str, list[Any]]:
    """All of ours."""
    found: dict[str, list[Any]] = {}
    for each in llm.get_metrics():
        if each.name.startswith(_PREFIX):
            value = getattr(each, "value", None)
            labels = {name: text for name, text in each.labels.items() if text and name != "model_name"}
            found.setdefault(each.name.removeprefix(_PREFIX), []).append(
                [labels, value if value is not None else [each.count, each.sum]]
            )
    return found


def asked(llm: Any, prompt: list[int], count: int, params: dict[str, Any] | None = None) -> Any:
    """One prompt."""
    from vllm import SamplingParams

    extra = {"kv_transfer_params": params} if params else None
    how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, extra_args=extra)
    [said] = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
    return list(said.outputs[0].token_ids), said.kv_transfer_params


def reloaded(llm: Any) -> None:
    """Every prompt is loaded again; what was counted last is told in the step of another request."""
    from tensorway_vllm.testing.engine import prompts

    llm.reset_prefix_cache()
    for prompt in [*prompts(), [1, 2, 3]]:
        asked(llm, prompt, 4)


def handing(link: Connection, model: str, extra: dict[str, Any]) -> None:
    """The engine that hands over, in a process of its own."""
    from tensorway_vllm.testing.engine import engine, prompts

    ours = _handover("prefill", extra)
    del ours["engine_id"]  # `MultiConnector` gives its children its own
    kv = {**_handover("prefill", {"connectors": [ours, dict(OFFLOADING)]}), "kv_connector": "MultiConnector"}
    llm = engine(model, kv)
    try:
        link.send([asked(llm, prompt, 1, {"hand_over": True})[1] for prompt in prompts()])
        link.recv()
        reloaded(llm)
        link.send(counted(llm))
    finally:
        llm.llm_engine.engine_core.shutdown()


def _handover(name: str, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "kv_connector": "TensorwayConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "engine_id": name,
        "kv_connector_extra_config": extra,
    }


def _heard(link: Connection) -> Any:
    if not link.poll(_ANSWER):
        raise DeadlineExceeded("An engine was asked.", f"It said nothing for {_ANSWER:g} s.", "Look at its log.")
    return link.recv()


def handover(model: str) -> dict[str, Any]:
    """Two engines: this process decodes."""
    from tensorway_vllm.testing.engine import engine, prompts

    secret = secrets.token_hex(16)
    meeting: Any = tensorway.create("rendezvous", "direct", {"secret": secret})
    extra = {
        "rendezvous": "direct",
        "rendezvous_options": {"address": meeting.address, "secret": secret},
        # Tickets are kept while the other engine starts.
        "options": {"transport": "local", "secret": secret, "lease": 600.0},
    }
    start = multiprocessing.get_context("spawn")
    link, other = start.Pipe()
    process = start.Process(target=handing, args=(other, model, extra))  # it has processes of its own
    process.start()
    other.close()  # so that its end is noticed
    try:
        llm = engine(model, _handover("decode", extra))
        try:
            for prompt, params in zip(prompts(), _heard(link), strict=True):
                asked(llm, prompt, 4, params)
            asked(llm, [1, 2, 3], 4)
            link.send("reload")
            told = {"prefill": _heard(link), "decode": counted(llm)}
        finally:
            llm.llm_engine.engine_core.shutdown()
    finally:
        link.close()
        process.join(30.0)
        if process.is_alive():
            process.terminate()
        meeting.close()
    return told


def offload(model: str) -> dict[str, Any]:
    """One engine."""
    from tensorway_vllm.testing.engine import engine, generated

    llm = engine(model, dict(OFFLOADING))
    generated(llm)
    reloaded(llm)
    told = {"offload": counted(llm)}
    llm.llm_engine.engine_core.shutdown()
    return told


_WAYS: Final = {"offload": offload, "handover": handover}

if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps({'counted': _WAYS[sys.argv[1]](sys.argv[2])})}\n")
    sys.stdout.flush()
