"""Networks that this process holds by a descriptor, and the programs of the system that furnish them.

Room `testing`; may import the ground. A network namespace here has no name that somebody would have to delete: it ends
with its descriptor, so with this process, however that ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from tensorway import settings

#: Seconds that anything which sets up or takes down may take.
PATIENCE: Final = 20.0
#: The programs that hosts are made of, and the packages that bring them.
_PROGRAMS: Final = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
#: What makes an ordinary user root in namespaces of its own; a command follows. Its first process reaps orphans.
ENCLOSED: Final = (
    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("sh", "-c", '"$@"; exit $?', "sh"),
)
_CLONE_NEWNET: Final = 0x40000000
_Returned = TypeVar("_Returned")


class Space:
    """One network namespace, with nothing in it but a loopback that is down."""

    def __init__(self) -> None:
        self._fd = _in_a_thread(_unshared)

    @property
    def path(self) -> str:
        """What other programs find it by."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def call(self, function: Callable[..., _Returned], *arguments: Any) -> _Returned:
        """Call a function in this network, in a thread; sockets and processes that it makes stay here."""

        def here() -> _Returned:
            _checked("setns", self._fd, _CLONE_NEWNET)
            return function(*arguments)

        return _in_a_thread(here)

    def run(self, *command: str, text: str = "") -> str:
        """Run a program of the system in this network."""
        return self.call(lambda: run(*command, text=text))

    def ip(self, *lines: str) -> None:
        """Run these lines of `ip` in this network."""
        self.run("ip", "-batch", "-", text="\n".join(lines))

    def close(self) -> None:
        """Let go of it: the kernel takes it down with the last process in it."""
        os.close(self._fd)


def program(name: str) -> str:
    """Where a program of the system is, also where only root looks; its name if it is nowhere."""
    return _found(name) or name


def run(*command: str, text: str = "") -> str:
    """Run a program of the system with this as its input, and return what it prints; a failure is what it says."""
    done = subprocess.run(
        [program(command[0]), *command[1:]], input=text, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{shlex.join(command)} failed: {' '.join([*text.splitlines(), said])}")
    return done.stdout


def first_line(process: subprocess.Popen[str], seconds: float) -> str:
    """The first line that a process prints; what there is when it ends or is late."""
    assert process.stdout is not None
    fd, until, said = process.stdout.fileno(), time.monotonic() + seconds, b""
    while b"\n" not in said and select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
        chunk = os.read(fd, 4096)
        if not chunk:
            break
        said += chunk
    return said.decode(errors="replace").partition("\n")[0]


def lacking(name: str, package: str) -> str:
    """Why a program cannot be run, and what to do about it; empty if it can."""
    return "" if _found(name) else f"the program {name} is not there: apt-get install {package}"


def no_hosts() -> str:
    """Why there can be no hosts on this machine, and what to do about it; empty if there can."""
    for name, package in _PROGRAMS.items():
        if why := lacking(name, package):
            return why
    if os.geteuid() != 0:
        return _as_another_user()
    spaces = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
    try:
        run("unshare", *spaces, "mount", "-t", "tmpfs", "try", "/dev/shm")
    except RuntimeError as error:
        return f"this root may make no namespaces (in a container: --cap-add SYS_ADMIN --cap-add NET_ADMIN): {error}"
    space = Space()
    try:
        space.ip("link add name try0 type veth peer name try1", "link add name try2 type bridge")
    except RuntimeError as error:
        return f"this kernel has no veth or no bridge: {error}"
    finally:
        space.close()
    return ""


def _as_another_user() -> str:
    try:
        run(*ENCLOSED, "true")
    except RuntimeError as error:
        return f"only root makes hosts, and this user may not become root in namespaces of its own: {error}"
    enclosed = f"{shlex.join(ENCLOSED)} python -m pytest"
    return f"only root makes hosts; run the tests as root of namespaces of their own: {enclosed}"


def _found(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([settings.get("PATH") or os.defpath, "/usr/sbin", "/sbin"]))


def _unshared() -> int:
    _checked("unshare", _CLONE_NEWNET)
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _checked(call: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[call](*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{call}: {os.strerror(ctypes.get_errno())}")


def _in_a_thread(function: Callable[[], _Returned]) -> _Returned:
    """Of its own, which ends then: a network is a property of a thread, and that of the caller must not change."""
    returned: list[_Returned] = []
    raised: list[BaseException] = []

    def body() -> None:
        try:
            returned.append(function())
        except BaseException as error:  # it goes to the caller
            raised.append(error)

    thread = threading.Thread(target=body, name="tensorway-network")
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    return returned[0]
