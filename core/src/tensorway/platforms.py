"""Which accelerators are here, read from files: device nodes, what the kernel says about them, and libraries on disk.

Ground: may import `types`, `errors`, `settings`, `native`. Importing this reads nothing. An examination reads small
files below `Machine.root`, opens no device and loads no library, so it can neither create a context on a device nor
crash. NVML and amdsmi are left out for that reason: each loads the driver's own library into this process, and what
they would say here (model, bus address, count) the kernel says in /proc/driver/nvidia and /sys/class/kfd as well.

Beside that, `boot_id`: transports and launchers compare it to learn whether two processes share a host.
"""

from __future__ import annotations

import os
import re
import stat
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import attrs

from tensorway import native, settings
from tensorway.errors import BackendNotFound
from tensorway.types import Fact, HookContext, Offer, ProbeResult

#: Seconds that one examination may take: a driver that is stuck can block a read in /proc for ever.
DEADLINE: Final = 5.0

#: Files are somebody else's: no more than this is read of one, looked through in a folder, or kept of a list.
_MAX_SIZE: Final = 65_536
_MAX_NAMES: Final = 256

#: What hides devices from a process. An empty value means something else to each, see `_hidden_by`.
_VISIBLE: Final = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
#: Where the loader looks, beside LD_LIBRARY_PATH and what /etc/ld.so.conf.d names.
_SYSTEM: Final = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/lib64", "/lib")
_NVIDIA: Final = ("/usr/lib/wsl/lib", "/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/local/cuda/compat")
_KFD_NODES: Final = "/sys/class/kfd/kfd/topology/nodes"
_CPU_FLAGS: Final = ("avx2", "avx512f", "amx_tile", "asimd", "sve", "sve2")
#: One line of torch/version.py. Bounded repeats: the file may be anything, and the time stays linear in its size.
_TORCH_LINE: Final = r"""(?m)^(__version__|cuda|hip|xpu)[ \t]*(?::[^=\n]{0,60})?=[ \t]*['"]([^'"\n\\]{1,60})['"]"""


@attrs.frozen
class Device:
    """One device of the machine that has its device file, as far as files tell."""

    #: Its place in the report. Not an ordinal of CUDA or HIP: these have orders of their own.
    index: int
    name: str
    #: On the PCI bus, `0000:18:00.0`; empty when no file says so.
    address: str = ""
    #: What a runtime opens to reach it: `/dev/nvidia0`.
    file: str = ""


@attrs.frozen
class PlatformReport:
    """What is here of one platform, whether it can be used, and how we know."""

    #: `cuda`, `rocm`, `xpu` or `cpu`.
    kind: str
    usable: bool
    #: Also when something else stands in the way, and not narrowed by variables such as CUDA_VISIBLE_DEVICES.
    devices: tuple[Device, ...]
    #: One line per fact that was seen: "/proc/driver/nvidia/version: 570.86.15".
    evidence: tuple[str, ...]
    #: One line.
    reason: str
    #: One line for the operator; empty when there is nothing to do.
    remedy: str = ""


@attrs.frozen
class TorchBuild:
    """How the torch that an import would find was built."""

    #: "2.13.0+cpu".
    version: str
    #: The CUDA that it was built with: "12.8".
    cuda: str | None = None
    #: The HIP that it was built with: "6.4.43482-0f2d60242".
    hip: str | None = None
    #: The SYCL compiler that it was built with: "20250101".
    xpu: str | None = None

    @property
    def platform(self) -> str:
        """The platform that it can drive: `cuda`, `rocm`, `xpu`, or `cpu` for a build without an accelerator."""
        return "cuda" if self.cuda else "rocm" if self.hip else "xpu" if self.xpu else "cpu"

    @property
    def cuda_major(self) -> int | None:
        """The major version of its CUDA, which decides between `cu12` and `cu13` wheels."""
        return _number((self.cuda or "").partition(".")[0]) or None

    def __str__(self) -> str:
        built = {"cuda": f"CUDA {self.cuda}", "rocm": f"ROCm (HIP {self.hip})", "xpu": "XPU", "cpu": "the CPU only"}
        return f"{self.version}, built for {built[self.platform]}"


@attrs.frozen
class Machine:
    """Where to look: everything is read below `root`, so that a test can build a machine out of files."""

    root: Path = Path("/")
    #: Where Python finds packages, absolute.
    python_path: tuple[str, ...] = ()
    #: The folders of LD_LIBRARY_PATH.
    library_path: tuple[str, ...] = ()
    #: The variables that hide devices; None for one that is not set.
    visible: Mapping[str, str | None] = attrs.field(factory=dict)
    #: How many processors this process may use; None for all that /proc/cpuinfo lists.
    processors: int | None = None

    @classmethod
    def here(cls) -> Machine:
        """The machine that this process runs on."""
        return cls(
            python_path=tuple(entry for entry in sys.path if entry.startswith("/")),
            library_path=tuple(entry for entry in (settings.get("LD_LIBRARY_PATH") or "").split(":") if entry),
            visible={name: settings.get(name) for name in _VISIBLE},
            processors=len(os.sched_getaffinity(0)),
        )

    def below(self, path: str) -> Path:
        """The place of an absolute path on this machine."""
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str:
        """The beginning of a regular file; empty when there is none or it cannot be read."""
        return _read(self.below(path))

    def has(self, path: str) -> bool:
        """Whether anything is there."""
        return os.path.exists(self.below(path))  # noqa: PTH110 - Path.exists raises on a loop of links before 3.12

    def may_open(self, path: str) -> bool:
        """Whether this user may read and write it; asks the kernel without opening it."""
        return os.access(self.below(path), os.R_OK | os.W_OK)

    def names(self, folder: str, pattern: str) -> tuple[str, ...]:
        """What a folder holds that matches the whole `pattern`; 2 comes before 10."""
        try:
            with os.scandir(self.below(folder)) as entries:
                found = [entry.name for entry in islice(entries, _MAX_SIZE) if re.fullmatch(pattern, entry.name)]
        except (OSError, ValueError):  # ValueError: a null byte in the path
            return ()
        return tuple(sorted(found, key=lambda name: (len(name), name))[:_MAX_NAMES])

    def library(self, pattern: str, folders: Iterable[str] = ()) -> str:
        """The path of the first library whose name matches; empty when there is none."""
        places = dict.fromkeys((*self.library_path, *folders, *_SYSTEM, *self._configured_folders()))
        found = (f"{place}/{name}" for place in places for name in self.names(place, pattern))
        # Not an empty one: images that were committed from a GPU container keep the mount point of the library.
        return next((path for path in found if self.text(path)), "")

    def _configured_folders(self) -> Iterable[str]:
        names = self.names("/etc/ld.so.conf.d", r"[ -~]+\.conf")
        lines = (line.strip() for name in names for line in self.text(f"/etc/ld.so.conf.d/{name}").splitlines())
        return islice((line for line in lines if line.startswith("/")), _MAX_NAMES)


@attrs.define
class _Seen:
    """What the files say about one platform, before it is judged."""

    library: str
    #: The kernel driver that is loaded, "NVIDIA driver 570.86.15"; empty when none is.
    driver: str = ""
    #: What the driver lists, and of that (or beside it) what has its files.
    listed: Sequence[Device] = ()
    devices: tuple[Device, ...] = ()
    #: A file that has to be opened and that this user may not open.
    locked: str = ""
    #: The variable that hides every device, with its value.
    hidden: str = ""
    evidence: list[str] = attrs.field(factory=list)

    def saw(self, where: str, what: str) -> None:
        self.evidence.append(_plain(f"{where}: {what}"))


@attrs.frozen
class _Accelerator:
    """What differs between accelerators: names, where to look, and what to tell the operator."""

    vendor: str
    #: The vendor on the PCI bus.
    pci: str
    library: str
    look: Callable[[Machine], _Seen]
    #: What gives a container its devices.
    run: str
    #: How to get the library.
    install: str


def examine(kind: str, machine: Machine) -> PlatformReport:
    """Read what `machine` says about one platform. Not cached and without a deadline: see `report`."""
    if kind == "cpu":
        return _examine_cpu(machine)
    if kind in _ACCELERATORS:
        return _judge(kind, _ACCELERATORS[kind], machine)
    names = ", ".join((*_ACCELERATORS, "cpu"))
    raise BackendNotFound(f"platform {kind!r} was to be examined.", f"There are: {names}.", "Use one of these.")


def report(kind: str, seconds: float = DEADLINE) -> PlatformReport:
    """What is here of one platform. Examined once per process; waits for at most `seconds`, whatever a driver does.

    A late answer is not remembered: the next call waits for the same examination again, and `forget` starts another.
    """
    fresh: Future[PlatformReport] = Future()
    answer = _answers.setdefault(kind, fresh)  # one step: of several threads, one finds its own
    if answer is fresh:
        # A daemon, because a read that hangs must not keep the process from exiting.
        threading.Thread(target=_answer, args=(kind, fresh), name=f"tensorway-{kind}", daemon=True).start()
    if wait([answer], seconds).done:
        return answer.result()
    late = f"its files did not answer within {seconds:g} s: a driver may be stuck"
    return PlatformReport(kind, False, (), (), late, "Look at what the driver says (dmesg); a reboot may be needed.")


def forget() -> None:
    """Let the next `report` look again: after a driver was installed, after a variable was changed."""
    _answers.clear()


native.with_failures(forget)


def torch_build(python_path: Iterable[str] | None = None) -> TorchBuild | None:
    """How the torch on this path (by default `sys.path`) was built; None when there is none, or none that says so.

    Read from the text of `torch/version.py`: importing torch takes seconds and loads the CUDA libraries.
    """
    texts = (_read(Path(entry, "torch", "version.py")) for entry in (sys.path if python_path is None else python_path))
    # The first torch on the path is what an import gets, even if it does not say how it was built.
    found = {name: _plain(value) for name, value in re.findall(_TORCH_LINE, next(filter(None, texts), ""))}
    version = found.pop("__version__", None)
    return TorchBuild(version, **found) if version else None


def boot_id() -> str:
    """What tells this boot of this kernel from every other, on this machine or another; containers share it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


def cuda(ctx: HookContext) -> Offer:
    """The hook of the platform `cuda`."""
    return _offer("cuda", 80, "NVIDIA GPUs, through the CUDA driver.")


def rocm(ctx: HookContext) -> Offer:
    """The hook of the platform `rocm`."""
    return _offer("rocm", 70, "AMD GPUs, through ROCm.")


def xpu(ctx: HookContext) -> Offer:
    """The hook of the platform `xpu`."""
    return _offer("xpu", 60, "Intel GPUs, through Level Zero.")


def cpu(ctx: HookContext) -> Offer:
    """The hook of the platform `cpu`."""
    return _offer("cpu", 10, "This machine's processors and memory.")


def _offer(kind: str, priority: int, summary: str) -> Offer:
    probe, construct = partial(_probe, kind), partial(_construct, kind)
    return Offer(kind, "platform", summary, probe, construct, devices={kind}, priority=priority, probe_in="host")


def _probe(kind: str) -> ProbeResult:
    seen = report(kind)
    names, evidence = ", ".join(device.name for device in seen.devices[:16]), "; ".join(seen.evidence[:32])
    facts: dict[str, Fact] = {"devices": len(seen.devices), "names": names, "evidence": evidence}
    return ProbeResult(seen.usable, seen.reason, seen.remedy, facts)


def _construct(kind: str, options: object, context: object) -> PlatformReport:
    return report(kind)


def _answer(kind: str, answer: Future[PlatformReport]) -> None:
    try:
        answer.set_result(examine(kind, Machine.here()))
    except BaseException as error:  # raised again in whoever asks
        answer.set_exception(error)


def _judge(kind: str, accelerator: _Accelerator, machine: Machine) -> PlatformReport:
    seen = accelerator.look(machine)
    if seen.library:
        seen.saw(accelerator.library, seen.library)
    torch = torch_build(str(machine.below(entry)) for entry in machine.python_path)
    if torch:
        seen.saw("torch", str(torch))
    obstacle = _obstacle(accelerator, seen)
    reason, remedy = obstacle or (", ".join(filter(None, (_summary(seen.devices), seen.driver))), "")
    if torch and torch.platform != kind and not obstacle:
        reason += f"; but the torch on the path is {torch}"
        remedy = f"Install a build of torch for {kind}: https://pytorch.org/get-started/locally/"
    return PlatformReport(kind, obstacle is None, seen.devices, tuple(seen.evidence), _plain(reason), remedy)


def _obstacle(its: _Accelerator, seen: _Seen) -> tuple[str, str] | None:
    """What stands in the way, as reason and remedy: devices first, then permission, library, and what the user set."""
    if not seen.devices:
        return _no_device(its, seen)
    if seen.locked:
        remedy = f"Let this user open it (ls -l {seen.locked}); often: usermod -aG render,video USER, and a new login."
        return f"{seen.locked} is here, but this user may not open it", remedy
    if not seen.library:
        return f"{seen.devices[0].file} is here, but there is no {its.library} in any library folder", its.install
    if seen.hidden:
        name = seen.hidden.partition("=")[0]
        return f"{_summary(seen.devices)}, all hidden by {seen.hidden}", f"Unset {name}, or name devices: {name}=0"
    return None


def _no_device(its: _Accelerator, seen: _Seen) -> tuple[str, str]:
    start = f"Start a container with its GPUs: docker run {its.run}."
    if seen.listed:
        lists = f"{seen.driver or 'the kernel'} lists {len(seen.listed)} GPU(s)"
        return f"{lists}, but there is no {seen.listed[0].file}", start
    if seen.driver:
        remedy = f"See whether the bus has one (lspci -d {its.pci}:) and what the driver says (dmesg)."
        return f"{seen.driver} is loaded, but it has no {its.vendor} device", remedy
    if seen.library:
        return f"{its.library} is here, but there is no {its.vendor} device and no driver", start
    remedy = f"Nothing, if the machine has none; else install the driver. {start}"
    return f"no {its.vendor} device, driver or library is here", remedy


def _look_for_cuda(machine: Machine) -> _Seen:
    seen = _Seen(machine.library(r"libcuda\.so\.1", _NVIDIA))
    for path in ("/proc/driver/nvidia/version", "/sys/module/nvidia/version"):
        if not seen.driver and (text := machine.text(path)):
            number = re.search(r"\b[0-9]{3,4}\.[0-9]{1,3}(\.[0-9]{1,3})?\b", text)
            seen.driver = f"NVIDIA driver {number[0] if number else 'of unknown version'}"
            seen.saw(path, number[0] if number else text[:80])
    found = _nvidia_devices(machine, seen) or _tegra_or_wsl(machine, seen)
    _settle(machine, seen, found, control=("/dev/nvidiactl", "/dev/nvidia-uvm"))
    # Under WSL one file stands for all devices, so how many there are is not known.
    count = None if machine.has("/dev/dxg") else len(seen.devices)
    seen.hidden = _hidden_by(machine, seen, "CUDA_VISIBLE_DEVICES", count)
    return seen


def _nvidia_devices(machine: Machine, seen: _Seen) -> list[Device]:
    """What the driver lists, and device files that it does not list: sandboxes such as gVisor have no /proc/driver."""
    found: dict[str, Device] = {}
    for position, bus in enumerate(machine.names("/proc/driver/nvidia/gpus", "[0-9a-fA-F:.]{7,20}")):
        fields = _fields(machine.text(f"/proc/driver/nvidia/gpus/{bus}/information"), ":")
        # By its number, not its place: a container may be given /dev/nvidia3 alone and still see the list of all.
        file = f"/dev/nvidia{_number(fields.get('Device Minor'), position)}"
        found[file] = Device(position, fields.get("Model", "NVIDIA GPU"), bus, file)
        seen.saw(f"/proc/driver/nvidia/gpus/{bus}", found[file].name)
    for name in machine.names("/dev", "nvidia[0-9]{1,4}"):
        found.setdefault(f"/dev/{name}", Device(len(found), "NVIDIA GPU", "", f"/dev/{name}"))
    return list(found.values())


def _tegra_or_wsl(machine: Machine, seen: _Seen) -> list[Device]:
    """GPUs without a number: a Jetson's, and what WSL lends of the Windows host in one file."""
    release = _plain(machine.text("/etc/nv_tegra_release").partition(",")[0].strip("# "), 40)
    if release:
        seen.driver = seen.driver or f"L4T {release}"
        seen.saw("/etc/nv_tegra_release", release)
    if release or machine.has("/dev/nvhost-gpu"):
        return [Device(0, "NVIDIA Tegra integrated GPU", "", "/dev/nvhost-gpu")]
    # The file is there for a GPU of any make; the library only for NVIDIA's.
    wsl = machine.has("/dev/dxg") and machine.text("/usr/lib/wsl/lib/libcuda.so.1")
    return [Device(0, "NVIDIA GPU (WSL)", "", "/dev/dxg")] if wsl else []


def _look_for_rocm(machine: Machine) -> _Seen:
    installs = [f"/opt/{name}/lib" for name in machine.names("/opt", r"rocm(-[0-9.]+)?")]
    # A ROCm build of torch brings the library along.
    wheels = [f"{entry}/{package}/lib" for entry in machine.python_path for package in ("torch", "_rocm_sdk_core")]
    seen = _Seen(machine.library(r"libamdhip64\.so(\.[0-9.]+)?", (*installs, *wheels)))
    if machine.has("/sys/module/amdgpu"):
        version = _plain(machine.text("/sys/module/amdgpu/version"), 40)
        seen.driver = f"amdgpu driver {version}".rstrip()
        seen.saw("/sys/module/amdgpu", version or "loaded")
    _settle(machine, seen, _amd_devices(machine, seen), control=("/dev/kfd",))
    # HIP reads CUDA's variable when its own is empty, and an empty list hides nothing; below it, ROCr takes it at its
    # word (ROCm/clr, device enumeration; ROCr's IsEnvVarSet).
    hip = "HIP_VISIBLE_DEVICES" if machine.visible.get("HIP_VISIBLE_DEVICES") else "CUDA_VISIBLE_DEVICES"
    by_hip = _hidden_by(machine, seen, hip, len(seen.devices), empty_hides=False)
    seen.hidden = _hidden_by(machine, seen, "ROCR_VISIBLE_DEVICES", len(seen.devices)) or by_hip
    return seen


def _amd_devices(machine: Machine, seen: _Seen) -> list[Device]:
    """What the kernel lists. There is no other way to tell: ROCm reads this list too, and fails without it."""
    found: list[Device] = []
    for node in machine.names(_KFD_NODES, "[0-9]{1,4}"):
        if _number(machine.text(f"{_KFD_NODES}/{node}/gpu_id").strip()) == 0:
            continue  # a processor, or a GPU that this container was not given
        fields = _fields(machine.text(f"{_KFD_NODES}/{node}/properties"), " ")
        target, place = _number(fields.get("gfx_target_version")), _number(fields.get("location_id"))
        name = f"AMD gfx{target // 10000}{target // 100 % 100:x}{target % 100:x}" if target else "AMD GPU"
        address = f"{_number(fields.get('domain')):04x}:{place >> 8 & 255:02x}:{place >> 3 & 31:02x}.{place & 7}"
        render = f"/dev/dri/renderD{_number(fields.get('drm_render_minor'), 128)}"
        # Without /dev/kfd no render node is of use, so it is the file that each of them lacks.
        found.append(Device(0, name, address, render if machine.has("/dev/kfd") else "/dev/kfd"))
        seen.saw(f"{_KFD_NODES}/{node}", f"{name} at {address}")
    return found


def _look_for_xpu(machine: Machine) -> _Seen:
    # Beside the system's folders those of Python installations, where wheels and conda put libraries.
    prefixes = [entry.rpartition("/")[0].rpartition("/")[0] for entry in machine.python_path]
    seen, found = _Seen(machine.library(r"libze_(loader|intel_gpu)\.so\.1", prefixes)), []
    for module in ("i915", "xe"):
        if machine.has(f"/sys/module/{module}"):
            seen.driver = f"{module} driver"
            seen.saw(f"/sys/module/{module}", "loaded")
    for card in machine.names("/sys/class/drm", "card[0-9]{1,4}"):
        folder = f"/sys/class/drm/{card}/device"
        fields = _fields(machine.text(f"{folder}/uevent"), "=")
        if _plain(machine.text(f"{folder}/vendor")) == "0x8086" and fields.get("DRIVER") in ("i915", "xe"):
            seen.driver = f"{fields['DRIVER']} driver"
            name = f"Intel GPU {_plain(machine.text(f'{folder}/device'), 20)}".rstrip()
            renders = machine.names(f"{folder}/drm", "renderD[0-9]{1,4}") or ("renderD128",)
            found.append(Device(0, name, fields.get("PCI_SLOT_NAME", ""), f"/dev/dri/{renders[0]}"))
            seen.saw(f"/sys/class/drm/{card}", f"{name}, {seen.driver}")
    _settle(machine, seen, found)
    # Its numbers may count tiles, of which a card has several; an empty mask masks nothing (intel/compute-runtime).
    seen.hidden = _hidden_by(machine, seen, "ZE_AFFINITY_MASK", None, empty_hides=False)
    return seen


def _settle(machine: Machine, seen: _Seen, found: Sequence[Device], control: Sequence[str] = ()) -> None:
    """Keep the devices that have their files. One that may be opened is enough; of `control`, all must be."""
    present = [device for device in found if machine.has(device.file)]
    opened = [device for device in present if machine.may_open(device.file)]
    files = [path for path in dict.fromkeys((*control, *(device.file for device in present))) if machine.has(path)]
    shut = [path for path in files if not machine.may_open(path) and (path in control or not opened)]
    for path in files:
        seen.saw(path, "may be opened" if machine.may_open(path) else "may not be opened by this user")
    seen.listed, seen.locked = found, shut[0] if shut else ""
    seen.devices = tuple(attrs.evolve(device, index=index) for index, device in enumerate(opened or present))


def _hidden_by(machine: Machine, seen: _Seen, name: str, count: int | None, *, empty_hides: bool = True) -> str:
    """`NAME='value'` if the variable hides every device.

    The list ends at its first entry that is none of `count` devices, so the first alone decides.
    """
    value = machine.visible.get(name)
    if value is None:
        return ""
    text = f"{name}={_plain(value, 40)!r}"
    seen.evidence.append(text)
    if number := re.match("[ ]*[0-9]{1,9}", value):
        return text if count is not None and int(number[0]) >= count else ""
    shows = value.strip().startswith(("GPU-", "MIG-")) if value.strip() else not empty_hides
    return "" if shows else text


def _examine_cpu(machine: Machine) -> PlatformReport:
    text = machine.text("/proc/cpuinfo")
    fields = _fields(text, ":")
    model = fields.get("model name") or fields.get("Hardware") or "processor of unknown model"
    flags = (re.search(r"(?m)^(?:flags|Features)[ \t]*:(.*)$", text) or ("", ""))[1].split()
    count = machine.processors or len(re.findall(r"(?m)^processor[ \t]*:", text)) or 1
    memory = _number(_fields(machine.text("/proc/meminfo"), ":").get("MemTotal", "").partition(" ")[0]) / 2**20
    evidence = [f"/proc/cpuinfo: {' '.join([model, *(flag for flag in _CPU_FLAGS if flag in flags)])}"] if text else []
    evidence += [f"/proc/meminfo: {memory:.1f} GiB"] if memory else []
    return PlatformReport("cpu", True, (Device(0, model),), tuple(evidence), f"{count} x {model}")


def _summary(devices: Sequence[Device]) -> str:
    names = [device.name for device in devices]
    return _plain(", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)), 100)


def _read(path: Path) -> str:
    try:
        # Only regular files, which those of /proc are: opening a device wakes it up, and a pipe would block.
        if not stat.S_ISREG(path.stat().st_mode):
            return ""
        with path.open("rb") as file:
            return file.read(_MAX_SIZE).decode("utf-8", "replace")
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return ""


def _fields(text: str, separator: str) -> dict[str, str]:
    """Lines of `name: value` with values fit for a report; of a name that comes again, the first."""
    parts = (line.partition(separator) for line in reversed(text.splitlines()))
    return {name.strip(): _plain(value, 80) for name, _, value in parts if value.strip()}


def _number(text: str | None, default: int = 0) -> int:
    return int(text) if text and re.fullmatch("[0-9]{1,12}", text) else default


def _plain(text: str, limit: int = 200) -> str:
    """Text from a file, made fit for one line of a report: printable ASCII, single spaces, bounded."""
    return re.sub("[^ -~]", "?", " ".join(text.split()))[:limit]


_KFD_AND_DRI: Final = "--device /dev/kfd --device /dev/dri"
_INSTALL: Final = {
    "cuda": "In a container, set NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the driver's libraries.",
    "rocm": "Install ROCm's HIP runtime, or a build of torch for ROCm, which has it; or set LD_LIBRARY_PATH.",
    "xpu": "Install Level Zero and Intel's compute runtime (libze1, libze-intel-gpu1); or set LD_LIBRARY_PATH.",
}
_ACCELERATORS: Final = {
    "cuda": _Accelerator("NVIDIA", "10de", "libcuda.so.1", _look_for_cuda, "--gpus all", _INSTALL["cuda"]),
    "rocm": _Accelerator("AMD", "1002", "libamdhip64.so", _look_for_rocm, _KFD_AND_DRI, _INSTALL["rocm"]),
    "xpu": _Accelerator("Intel", "8086", "libze_loader.so.1", _look_for_xpu, "--device /dev/dri", _INSTALL["xpu"]),
}
_answers: Final[dict[str, Future[PlatformReport]]] = {}
# A forked child has the questions that were under way, and not the threads that would answer them.
os.register_at_fork(after_in_child=_answers.clear)
