"""Ask a backend whether it can be used here, within a deadline: neither a crash nor a hang of it reaches the caller.

Room `plugins`; may import the ground. A probe that may load native code runs in a child process, because an
instruction that the CPU lacks or a failed assertion in a library ends the process that loaded it and no `except` can
help. A pure Python probe runs in a thread. Both end in a `ProbeResult` or a `ProbeFailure`, always.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO, Any, Final

import attrs

from tensorway.types import Offer, ProbeResult

#: A result larger than this is no result.
_MAX_RESULT_BYTES: Final = 1 << 20
#: How much of what the child printed is kept for the report.
_TAIL_BYTES: Final = 2048

_BOOT: Final = (
    "import json, sys; sys.path[:] = json.load(sys.stdin); "
    "from tensorway.plugins.child import main; main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))"
)


@attrs.frozen
class ProbeFailure:
    """The probe itself failed: it raised, died, hung, or answered nonsense.

    (A probe that says "no" is a `ProbeResult`.)
    """

    code: str
    reason: str
    remedy: str


@attrs.frozen
class Answer:
    """How a probe ended, and the last lines that its process printed: libraries say there what their codes mean."""

    result: ProbeResult | ProbeFailure
    output: str = ""


def run(offer: Offer, seconds: float) -> Answer:
    """Run the offer's probe where it says, for at most `seconds`."""
    if offer.probe_in == "host":
        return Answer(_in_thread(offer.probe, seconds))
    module: str | None = getattr(offer.probe, "__module__", None)
    name: str = getattr(offer.probe, "__qualname__", "<")
    if module in (None, "__main__") or "<" in name:
        reason = f"its probe {name!r} cannot be imported by name, and a probe that may load native code must be"
        remedy = "Make the probe a function at module level, or set probe_in='host'."
        return Answer(ProbeFailure("offer-invalid", reason, remedy))
    return _in_child(f"{module}:{name}", seconds)


def _in_thread(probe: Callable[[], ProbeResult], seconds: float) -> ProbeResult | ProbeFailure:
    answers: list[ProbeResult | ProbeFailure] = []

    def ask() -> None:
        try:
            result: Any = probe()
        except BaseException as error:  # this thread is ours; SystemExit would only end it silently
            answers.append(_raised(type(error).__name__, str(error)))
        else:
            answers.append(result if isinstance(result, ProbeResult) else _nonsense(f"a {type(result).__name__}"))

    # A daemon, because a probe that hangs must not keep the process from exiting.
    thread = threading.Thread(target=ask, name="tensorway-probe", daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else _late(seconds)


def _in_child(reference: str, seconds: float) -> Answer:
    if not sys.executable:
        return _not_run("sys.executable is empty", "Set sys.executable.")
    deadline = time.monotonic() + seconds
    read_fd, write_fd = os.pipe()
    try:
        with tempfile.TemporaryFile() as output:
            command = [sys.executable, "-c", _BOOT, reference, str(write_fd), str(seconds)]
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_fd,),
                    start_new_session=True,
                )
            except OSError as error:
                return _not_run(str(error), "Look at the limits of this process.")
            finally:
                os.close(write_fd)
            _send_path(child)
            answer = _read_line(read_fd, deadline)
            # After its answer the child has nothing left to do; without one, it may be busy dying.
            status = _reap(child, time.monotonic() + 0.5 if answer else deadline)
            return Answer(_judge(answer, status, seconds), _tail(output))
    finally:
        os.close(read_fd)


def _send_path(child: subprocess.Popen[bytes]) -> None:
    assert child.stdin is not None
    try:
        with child.stdin as stdin:
            stdin.write(json.dumps([str(entry) for entry in sys.path]).encode())
    except BrokenPipeError:
        return  # it is dead already; its exit status says why


def _read_line(fd: int, deadline: float) -> bytes | None:
    """The answer, up to its line's end or the stream's; None when the deadline came first.

    Not only the stream's end: a helper process that the library forked may hold the pipe open for ever.
    """
    data = bytearray()
    poller = select.poll()  # not select.select, which fails in a process with over 1,024 files open
    poller.register(fd, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        if poller.poll(left * 1000):
            chunk = os.read(fd, 65_536)
            data += chunk
            if not chunk or chunk.endswith(b"\n") or len(data) > _MAX_RESULT_BYTES:
                return bytes(data)
    return None


def _reap(child: subprocess.Popen[bytes], deadline: float) -> int | None:
    """The child's exit status; None when it had to be killed.

    Its whole session goes: a probe may have started helpers.
    """
    # The answer is in or the stream is closed, so the end is near: a moment of grace even when the deadline has come.
    deadline = max(deadline, time.monotonic() + 0.2)
    ended = False
    while not ended and time.monotonic() < deadline:
        # WNOWAIT: as long as the child is not reaped, its number cannot become somebody else's, and killpg is safe.
        ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        if not ended:
            time.sleep(0.002)
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nothing is left of it
    status = child.wait()
    return status if ended else None


def _judge(answer: bytes | None, status: int | None, seconds: float) -> ProbeResult | ProbeFailure:
    if answer is None or (not answer and status is None):
        return _late(seconds)
    if not answer:
        return _died(status)
    try:
        fields = json.loads(answer)
        if "error" in fields:
            return _raised(str(fields["error"]), str(fields["message"]))
        return ProbeResult(bool(fields["usable"]), str(fields["reason"]), str(fields["remedy"]), dict(fields["facts"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return _nonsense(f"something unreadable ({error})")


def _not_run(why: str, remedy: str) -> Answer:
    return Answer(ProbeFailure("probe-not-run", f"no child process could be started for its probe: {why}", remedy))


def _died(status: int | None) -> ProbeFailure:
    if status is not None and status < 0:
        name = _signal_name(-status)
        reason = f"its library killed the probe's process with {name} ({_HINTS.get(name, 'in native code')})"
    else:
        reason = f"its library ended the probe's process with exit status {status}"
    remedy = "Install a build of the library that fits this machine; this process is unharmed."
    return ProbeFailure("probe-aborted", reason, remedy)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


_HINTS: Final = {
    "SIGILL": "an instruction that this CPU lacks",
    "SIGSEGV": "a bad memory access",
    "SIGABRT": "a failed assertion",
    "SIGBUS": "a bad memory access",
    "SIGFPE": "an arithmetic error",
    "SIGKILL": "from outside: out of memory?",
}


def _raised(error: str, message: str) -> ProbeFailure:
    text = " ".join(message.split())[:300]
    if error == "SystemExit":
        reason = f"its probe called sys.exit({text})"
    else:
        reason = f"its probe raised {error}: {text}" if text else f"its probe raised {error}"
    return ProbeFailure(
        "probe-raised", reason, "Report this to the plugin's author; a probe answers, it does not raise."
    )


def _late(seconds: float) -> ProbeFailure:
    return ProbeFailure(
        "probe-timeout",
        f"its probe did not answer within {seconds:g} s",
        "Raise TENSORWAY_PROBE_TIMEOUT on a slow machine; deny a plugin that hangs: TENSORWAY_PLUGINS=-NAME.",
    )


def _nonsense(what: str) -> ProbeFailure:
    return ProbeFailure(
        "probe-raised", f"its probe returned {what}, not a ProbeResult", "Report this to the plugin's author."
    )


def _tail(output: IO[bytes]) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _TAIL_BYTES))
    return output.read().decode("utf-8", "backslashreplace").strip()
