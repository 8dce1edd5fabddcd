"""Prefill in one process and decode in another: `python -m tensorway_vllm.testing.disaggregated MODEL`.

Both are real engines, which meet at a rendezvous in this process. The line that begins with `{"tokens"` tells, in JSON,
for each prompt what the prefilling engine said, what the other one said with the ticket, what it says alone and with a
ticket that was changed, and the external hits of each; last, what it says with a ticket of an engine that was killed.
May import vllm in the processes that it starts.
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

_ANSWER: Final = 300.0


def serve(link: Connection, model: str, name: str, extra: dict[str, Any]) -> None:
    """An engine that answers questions until it hears None."""
    from vllm import SamplingParams

    from tensorway_vllm.testing.engine import engine, hits

    kv = {
        "kv_connector": "TensorwayConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "engine_id": name,
        "kv_connector_extra_config": extra,
    }
    llm = engine(model, kv)
    link.send("ready")
    while (asked := link.recv()) is not None:
        prompt, count, params = asked
        llm.reset_prefix_cache()
        known = hits(llm)
        how = SamplingParams(
            temperature=0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            extra_args={"kv_transfer_params": params} if params else None,
        )
        [said] = llm.generate([{"prompt_token_ids": prompt}], how, use_tqdm=False)
        link.send((list(said.outputs[0].token_ids), said.kv_transfer_params, hits(llm) - known))
    llm.llm_engine.engine_core.shutdown()


class Served:
    """This side of an engine."""

    def __init__(self, model: str, name: str, extra: dict[str, Any]) -> None:
        start = multiprocessing.get_context("spawn")
        self._link, other = start.Pipe()
        self._process = start.Process(target=serve, args=(other, model, name, extra), daemon=True)
        self._process.start()

    def hear(self) -> Any:
        """Its next answer."""
        if not self._link.poll(_ANSWER):
            raise DeadlineExceeded("An engine was asked.", f"It said nothing for {_ANSWER:g} s.", "Look at its log.")
        return self._link.recv()

    def ask(self, prompt: list[int], count: int, params: dict[str, Any] | None = None) -> Any:
        """Tokens, what goes to the next engine, and tokens that were loaded."""
        self._link.send((prompt, count, params))
        return self.hear()

    def kill(self) -> None:
        """As a machine that loses its power."""
        self._process.kill()
        self._process.join(30.0)

    def close(self) -> None:
        """End it."""
        if not self._process.is_alive():
            return
        self._link.send(None)
        self._process.join(30.0)
        if self._process.is_alive():
            self._process.kill()


def main(model: str) -> list[dict[str, Any]]:
    """Hand each prompt over."""
    from tensorway_vllm.testing.engine import prompts

    secret = secrets.token_hex(16)
    meeting: Any = tensorway.create("rendezvous", "direct", {"secret": secret})
    extra = {
        "rendezvous": "direct",
        "rendezvous_options": {"address": meeting.address, "secret": secret},
        "options": {"transport": "local", "secret": secret, "deadline": 5.0, "presence": 2.0},
    }
    prefill, decode = Served(model, "prefill", extra), Served(model, "decode", extra)
    told = []
    try:
        prefill.hear()
        decode.hear()
        for prompt in prompts():
            first, params, _ = prefill.ask(prompt, 1, {"hand_over": True})
            handed, _, loaded = decode.ask(prompt, 8, params)
            alone, _, none = decode.ask(prompt, 8)
            ticket = {"tensorway": {**params["tensorway"], "seal": "0" * 64}} if params else None
            forged, _, nothing = decode.ask(prompt, 8, ticket)
            told.append({"first": first, "handed": handed, "alone": alone, "forged": forged})
            told[-1]["hits"] = [loaded, none, nothing]
        prompt = prompts()[0][::-1]
        _, params, _ = prefill.ask(prompt, 1, {"hand_over": True})
        prefill.kill()
        orphaned, _, _ = decode.ask(prompt, 8, params)
        alone, _, _ = decode.ask(prompt, 8)
        told.append({"orphaned": orphaned, "alone": alone, "had_ticket": params is not None})
    finally:
        prefill.close()
        decode.close()
        meeting.close()
    return told


if __name__ == "__main__":
    sys.stdout.write(f"{json.dumps({'tokens': main(sys.argv[1])})}\n")
    sys.stdout.flush()
