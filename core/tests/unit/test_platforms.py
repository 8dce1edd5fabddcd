"""Every way in which an accelerator can be half there is told apart, from files alone.

What is fake here is the root of the file system: each test builds a machine below `tmp_path` and examines it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

import tensorway
from tensorway import hookspecs, platforms, plugins
from tensorway.errors import BackendNotFound, BackendUnavailable
from tensorway.platforms import Device, Machine, PlatformReport, TorchBuild, examine, report, torch_build
from tensorway.plugins import isolated
from tensorway.plugins.slots import check_hook, check_offer
from tensorway.types import HookContext

KINDS = ("cuda", "rocm", "xpu", "cpu")
CONTEXT = HookContext(api=hookspecs.API, core_version=tensorway.__version__)

#: As the two flavors of NVIDIA's kernel module write it.
NVRM_OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U22)\n"
    "GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)\n"
)
NVRM_CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
GPU_INFORMATION = """Model: \t\t NVIDIA H100 80GB HBM3
IRQ:   \t\t 16
GPU UUID: \t GPU-5a5f0e7c-0000-0000-0000-000000000000
Bus Type: \t PCIe
Bus Location: \t {bus}
Device Minor: \t {minor}
"""
KFD_PROPERTIES = (
    "cpu_cores_count 0\nsimd_count 1216\ngfx_target_version 90402\nlocation_id {location}\ndomain 0\n"
    "drm_render_minor {render}\n"
)
CPU_BUILD = "from typing import Optional\n\n__version__ = '2.13.0+cpu'\ndebug = False\ncuda: Optional[str] = None\n"
CUDA_BUILD = (
    "__all__ = ['__version__', 'debug', 'cuda']\n__version__ = '2.8.0+cu128'\ncuda: Optional[str] = '12.8'\n"
    "git_version = 'a1cb3cc0'\nhip: Optional[str] = None\nxpu: Optional[str] = None\n"
)
ROCM_BUILD = "__version__ = '2.8.0+rocm6.4'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4.43482-0f2d60242'\n"
XPU_BUILD = "__version__ = '2.8.0+xpu'\ncuda = None\nhip = None\nxpu: Optional[str] = '20250101'\n"

CUDA_GRANT = "Start a container with its GPUs: docker run --gpus all."
ROCM_GRANT = "Start a container with its GPUs: docker run --device /dev/kfd --device /dev/dri."
XPU_GRANT = "Start a container with its GPUs: docker run --device /dev/dri."


@attrs.frozen
class Fake:
    """A machine under construction, made of files."""

    root: Path

    def file(self, path: str, content: str | bytes = "x") -> Path:
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content if isinstance(content, bytes) else content.encode())
        return place

    def machine(self, *, library_path: tuple[str, ...] = (), **visible: str) -> Machine:
        return Machine(
            self.root, python_path=("/venv/lib/python3.12/site",), library_path=library_path, visible=visible
        )

    def examine(self, kind: str, **arguments) -> PlatformReport:
        return examine(kind, self.machine(**arguments))

    def torch(self, text: str) -> None:
        self.file("/venv/lib/python3.12/site/torch/version.py", text)

    def nvidia_driver(self) -> None:
        self.file("/proc/driver/nvidia/version", NVRM_OPEN)

    def nvidia_listed(self, *minors: int) -> None:
        for place, minor in enumerate(minors):
            bus = f"0000:{place + 1}8:00.0"
            text = GPU_INFORMATION.format(bus=bus, minor=minor)
            self.file(f"/proc/driver/nvidia/gpus/{bus}/information", text)

    def nvidia_files(self, *minors: int) -> None:
        for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{minor}" for minor in minors)):
            self.file(f"/dev/{name}")

    def nvidia_library(self) -> None:
        self.file("/usr/lib/x86_64-linux-gnu/libcuda.so.1")

    def nvidia(self, *minors: int) -> None:
        """A machine on which CUDA works."""
        self.nvidia_driver()
        self.nvidia_listed(*minors)
        self.nvidia_files(*minors)
        self.nvidia_library()

    def amd_driver(self) -> None:
        self.file("/sys/module/amdgpu/version", "6.10.5\n")

    def amd_listed(self, *renders: int) -> None:
        nodes = "/sys/class/kfd/kfd/topology/nodes"
        self.file(f"{nodes}/0/gpu_id", "0\n")  # the processor
        for place, render in enumerate(renders, start=1):
            self.file(f"{nodes}/{place}/gpu_id", "28851\n")
            self.file(f"{nodes}/{place}/properties", KFD_PROPERTIES.format(location=place * 256 + 26, render=render))

    def amd_files(self, *renders: int) -> None:
        for name in ("kfd", *(f"dri/renderD{render}" for render in renders)):
            self.file(f"/dev/{name}")

    def amd_library(self) -> None:
        self.file("/opt/rocm-6.4.1/lib/libamdhip64.so.6")

    def amd(self, *renders: int) -> None:
        """A machine on which ROCm works."""
        self.amd_driver()
        self.amd_listed(*renders)
        self.amd_files(*renders)
        self.amd_library()

    def intel_card(self, card: int = 0, render: int = 128, driver: str = "xe", vendor: str = "0x8086") -> None:
        folder = f"/sys/class/drm/card{card}/device"
        self.file(f"{folder}/vendor", f"{vendor}\n")
        self.file(f"{folder}/device", "0x56a0\n")
        self.file(f"{folder}/uevent", f"DRIVER={driver}\nPCI_ID=8086:56A0\nPCI_SLOT_NAME=0000:0{card}:02.0\n")
        (self.root / f"sys/class/drm/card{card}/device/drm/renderD{render}").mkdir(parents=True)

    def intel_library(self) -> None:
        self.file("/usr/lib/x86_64-linux-gnu/libze_loader.so.1")

    def intel(self) -> None:
        """A machine on which Level Zero works."""
        self.intel_card()
        self.file("/dev/dri/renderD128")
        self.intel_library()

    def processor(self) -> None:
        self.file(
            "/proc/cpuinfo",
            "processor\t: 0\nmodel name\t: Xeon 8480\nflags\t\t: fpu avx2 avx512f amx_tile\n\n"
            "processor\t: 1\nmodel name\t: Atom\n",
        )
        self.file("/proc/meminfo", "MemTotal:       33554432 kB\nMemFree:  1 kB\n")


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path / "root")


@pytest.fixture(autouse=True)
def _nothing_is_known() -> Iterator[None]:
    platforms.forget()
    yield
    platforms.forget()


def told(found: PlatformReport) -> tuple[bool, str, str]:
    return found.usable, found.reason, found.remedy


# cuda


def test_a_machine_without_anything_of_nvidia_says_so(fake):
    remedy = f"Nothing, if the machine has none; else install the driver. {CUDA_GRANT}"
    expected = PlatformReport("cuda", False, (), (), "no NVIDIA device, driver or library is here", remedy)
    assert expected == fake.examine("cuda")


def test_a_driver_without_a_device_is_told_apart(fake):
    fake.nvidia_driver()
    fake.nvidia_library()
    remedy = "See whether the bus has one (lspci -d 10de:) and what the driver says (dmesg)."
    expected = (False, "NVIDIA driver 570.86.15 is loaded, but it has no NVIDIA device", remedy)
    assert expected == told(fake.examine("cuda"))


def test_gpus_that_the_driver_lists_without_device_files_are_a_container_without_access(fake):
    fake.nvidia_driver()
    fake.nvidia_listed(0, 1)
    fake.nvidia_library()
    found = fake.examine("cuda")
    expected = (False, "NVIDIA driver 570.86.15 lists 2 GPU(s), but there is no /dev/nvidia0", CUDA_GRANT)
    assert expected == told(found)
    assert () == found.devices


def test_device_files_without_the_library_are_a_container_without_the_drivers_libraries(fake):
    fake.nvidia_driver()
    fake.nvidia_listed(0)
    fake.nvidia_files(0)
    found = fake.examine("cuda")
    assert (False, "/dev/nvidia0 is here, but there is no libcuda.so.1 in any library folder") == told(found)[:2]
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in found.remedy
    assert 1 == len(found.devices)


def test_a_library_without_driver_and_device_is_an_image_on_the_wrong_machine(fake):
    fake.nvidia_library()
    expected = (False, "libcuda.so.1 is here, but there is no NVIDIA device and no driver", CUDA_GRANT)
    assert expected == told(fake.examine("cuda"))


def test_a_machine_with_everything_is_usable_and_its_devices_are_known_by_name_and_address(fake):
    fake.nvidia(0, 1)
    found = fake.examine("cuda")
    assert (True, "2 x NVIDIA H100 80GB HBM3, NVIDIA driver 570.86.15", "") == told(found)
    expected = (
        Device(0, "NVIDIA H100 80GB HBM3", "0000:18:00.0", "/dev/nvidia0"),
        Device(1, "NVIDIA H100 80GB HBM3", "0000:28:00.0", "/dev/nvidia1"),
    )
    assert expected == found.devices


def test_each_fact_that_was_seen_is_one_line_of_evidence(fake):
    fake.nvidia(0)
    fake.torch(CUDA_BUILD)
    expected = (
        "/proc/driver/nvidia/version: 570.86.15",
        "/proc/driver/nvidia/gpus/0000:18:00.0: NVIDIA H100 80GB HBM3",
        "/dev/nvidiactl: may be opened",
        "/dev/nvidia-uvm: may be opened",
        "/dev/nvidia0: may be opened",
        "CUDA_VISIBLE_DEVICES='0'",
        "libcuda.so.1: /usr/lib/x86_64-linux-gnu/libcuda.so.1",
        "torch: 2.8.0+cu128, built for CUDA 12.8",
    )
    assert expected == fake.examine("cuda", CUDA_VISIBLE_DEVICES="0").evidence


@pytest.mark.parametrize(
    ("path", "text", "version"),
    [
        ("/proc/driver/nvidia/version", NVRM_OPEN, "570.86.15"),
        ("/proc/driver/nvidia/version", NVRM_CLOSED, "535.104.05"),
        ("/proc/driver/nvidia/version", "NVRM version: something new\n", "of unknown version"),
        ("/sys/module/nvidia/version", "580.159.04\n", "580.159.04"),
    ],
)
def test_the_version_of_the_driver_is_found_where_it_is_written(fake, path, text, version):
    fake.file(path, text)
    assert f"NVIDIA driver {version} is loaded, but it has no NVIDIA device" == fake.examine("cuda").reason


def test_a_sandbox_without_the_drivers_proc_files_is_usable_by_its_device_files(fake):
    fake.nvidia_files(0)
    fake.file("/usr/local/nvidia/lib64/libcuda.so.1")
    found = fake.examine("cuda")
    assert (True, "1 x NVIDIA GPU", "") == told(found)
    assert (Device(0, "NVIDIA GPU", "", "/dev/nvidia0"),) == found.devices


def test_a_container_that_was_given_one_gpu_of_several_has_that_one(fake):
    fake.nvidia_driver()
    fake.nvidia_listed(2, 3, 10)
    fake.nvidia_files(10)
    fake.nvidia_library()
    found = fake.examine("cuda")
    assert (Device(0, "NVIDIA H100 80GB HBM3", "0000:38:00.0", "/dev/nvidia10"),) == found.devices
    assert found.usable


def test_control_files_are_not_devices(fake):
    fake.nvidia_files()
    fake.nvidia_library()
    found = fake.examine("cuda")
    assert (False, ()) == (found.usable, found.devices)


@pytest.mark.parametrize("value", ["", " ", "-1", "-1,0", "none", "NoDevFiles", "2", "7,0"])
def test_a_variable_that_hides_every_gpu_is_named(fake, value):
    fake.nvidia(0, 1)
    found = fake.examine("cuda", CUDA_VISIBLE_DEVICES=value)
    shown = value.strip()
    reason = f"2 x NVIDIA H100 80GB HBM3, all hidden by CUDA_VISIBLE_DEVICES='{shown}'"
    remedy = "Unset CUDA_VISIBLE_DEVICES, or name devices: CUDA_VISIBLE_DEVICES=0"
    assert (False, reason, remedy) == told(found)
    assert 2 == len(found.devices)


@pytest.mark.parametrize("value", ["0", "1", "1,0", "0,-1", " 1", "GPU-5a5f0e7c", "MIG-5a5f0e7c"])
def test_a_variable_that_leaves_a_gpu_visible_hides_nothing(fake, value):
    fake.nvidia(0, 1)
    assert fake.examine("cuda", CUDA_VISIBLE_DEVICES=value).usable


@pytest.mark.parametrize(
    ("build", "label"),
    [
        (CPU_BUILD, "2.13.0+cpu, built for the CPU only"),
        (ROCM_BUILD, "2.8.0+rocm6.4, built for ROCm (HIP 6.4.43482-0f2d60242)"),
    ],
)
def test_a_torch_that_cannot_use_the_gpu_does_not_make_it_unusable_and_is_named(fake, build, label):
    fake.nvidia(0)
    fake.torch(build)
    usable, reason, remedy = told(fake.examine("cuda"))
    expected = f"1 x NVIDIA H100 80GB HBM3, NVIDIA driver 570.86.15; but the torch on the path is {label}"
    assert (True, expected) == (usable, reason)
    assert "Install a build of torch for cuda: https://pytorch.org/get-started/locally/" == remedy


def test_a_torch_that_can_use_the_gpu_is_no_matter(fake):
    fake.nvidia(0)
    fake.torch(CUDA_BUILD)
    assert (True, "1 x NVIDIA H100 80GB HBM3, NVIDIA driver 570.86.15", "") == told(fake.examine("cuda"))


def test_what_stands_in_the_way_is_said_before_what_torch_was_built_for(fake):
    fake.torch(CPU_BUILD)
    assert "no NVIDIA device, driver or library is here" == fake.examine("cuda").reason


@pytest.mark.parametrize(
    "folder",
    [
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/nvidia/lib",
        "/usr/local/cuda/compat",
        "/lib64",
        "/lib",
        "/opt/said/by/the/user",
        "/opt/said/by/ld.so.conf",
    ],
)
def test_the_library_is_found_in_every_folder_of_the_loader(fake, folder):
    fake.nvidia_files(0)
    fake.file(f"{folder}/libcuda.so.1")
    fake.file("/etc/ld.so.conf.d/nvidia.conf", "# comment\n\n  /opt/said/by/ld.so.conf  \n")
    found = fake.examine("cuda", library_path=("/opt/said/by/the/user",))
    assert found.usable
    assert f"libcuda.so.1: {folder}/libcuda.so.1" in found.evidence


@pytest.mark.parametrize("name", ["libcuda.so", "libcuda.so.1.1", "libcudart.so.1", "stubs/libcuda.so.1"])
def test_another_library_is_not_taken_for_the_drivers(fake, name):
    fake.nvidia_files(0)
    fake.file(f"/usr/lib/{name}")
    assert not fake.examine("cuda").usable


def test_the_empty_file_that_a_committed_container_leaves_is_no_library(fake):
    fake.nvidia_files(0)
    fake.file("/usr/lib/x86_64-linux-gnu/libcuda.so.1", "")
    reason = "/dev/nvidia0 is here, but there is no libcuda.so.1 in any library folder"
    assert reason == fake.examine("cuda").reason


def test_under_wsl_one_file_stands_for_all_gpus_so_that_no_number_is_out_of_range(fake):
    fake.file("/dev/dxg")
    fake.file("/usr/lib/wsl/lib/libcuda.so.1")
    assert (True, "1 x NVIDIA GPU (WSL)", "") == told(fake.examine("cuda"))
    assert fake.examine("cuda", CUDA_VISIBLE_DEVICES="1").usable
    assert not fake.examine("cuda", CUDA_VISIBLE_DEVICES="-1").usable


def test_under_wsl_the_gpu_of_another_maker_is_not_nvidias(fake):
    fake.file("/dev/dxg")
    assert "no NVIDIA device, driver or library is here" == fake.examine("cuda").reason


def test_a_jetson_has_one_integrated_gpu(fake):
    fake.file("/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    fake.file("/dev/nvhost-gpu")
    fake.file("/usr/lib/aarch64-linux-gnu/libcuda.so.1")
    found = fake.examine("cuda")
    assert (True, "1 x NVIDIA Tegra integrated GPU, L4T R36 (release)", "") == told(found)


def test_a_jetsons_release_file_alone_is_a_container_without_its_gpu(fake):
    fake.file("/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3\n")
    expected = (False, "L4T R36 (release) lists 1 GPU(s), but there is no /dev/nvhost-gpu", CUDA_GRANT)
    assert expected == told(fake.examine("cuda"))


# rocm


def test_a_machine_without_anything_of_amd_says_so(fake):
    found = fake.examine("rocm")
    assert (False, "no AMD device, driver or library is here") == told(found)[:2]
    assert found.remedy.endswith(ROCM_GRANT)


def test_an_amd_driver_without_a_gpu_is_told_apart(fake):
    fake.amd_driver()
    fake.amd_listed()
    fake.amd_files(128)  # of the card of somebody else: amdgpu makes /dev/kfd even when it has no GPU
    remedy = "See whether the bus has one (lspci -d 1002:) and what the driver says (dmesg)."
    assert (False, "amdgpu driver 6.10.5 is loaded, but it has no AMD device", remedy) == told(fake.examine("rocm"))


def test_a_container_sees_the_list_of_amd_gpus_and_lacks_kfd(fake):
    fake.amd(128)
    (fake.root / "dev/kfd").unlink()
    expected = (False, "amdgpu driver 6.10.5 lists 1 GPU(s), but there is no /dev/kfd", ROCM_GRANT)
    assert expected == told(fake.examine("rocm"))


def test_a_container_with_kfd_and_no_render_node_lacks_the_render_node(fake):
    fake.amd(128)
    (fake.root / "dev/dri/renderD128").unlink()
    assert "amdgpu driver 6.10.5 lists 1 GPU(s), but there is no /dev/dri/renderD128" == fake.examine("rocm").reason


def test_amd_device_files_without_hip_are_told_apart(fake):
    fake.amd(128)
    (fake.root / "opt/rocm-6.4.1/lib/libamdhip64.so.6").unlink()
    usable, reason, remedy = told(fake.examine("rocm"))
    assert (False, "/dev/dri/renderD128 is here, but there is no libamdhip64.so in any library folder") == (
        usable,
        reason,
    )
    assert "ROCm's HIP runtime" in remedy


def test_hip_without_a_gpu_is_an_image_on_the_wrong_machine(fake):
    fake.amd_library()
    expected = (False, "libamdhip64.so is here, but there is no AMD device and no driver", ROCM_GRANT)
    assert expected == told(fake.examine("rocm"))


def test_a_machine_with_rocm_is_usable_and_its_targets_are_known(fake):
    fake.amd(128, 129)
    found = fake.examine("rocm")
    assert (True, "2 x AMD gfx942, amdgpu driver 6.10.5", "") == told(found)
    expected = (
        Device(0, "AMD gfx942", "0000:01:03.2", "/dev/dri/renderD128"),
        Device(1, "AMD gfx942", "0000:02:03.2", "/dev/dri/renderD129"),
    )
    assert expected == found.devices


@pytest.mark.parametrize(("version", "target"), [("90010", "gfx90a"), ("100300", "gfx1030"), ("110001", "gfx1101")])
def test_a_gfx_target_is_written_as_compilers_write_it(fake, version, target):
    fake.amd(128)
    properties = f"gfx_target_version {version}\ndrm_render_minor 128\n"
    fake.file("/sys/class/kfd/kfd/topology/nodes/1/properties", properties)
    assert f"AMD {target}" == fake.examine("rocm").devices[0].name


def test_a_container_that_was_given_one_amd_gpu_has_that_one(fake):
    fake.amd(128, 129)
    (fake.root / "dev/dri/renderD128").unlink()
    found = fake.examine("rocm")
    assert (Device(0, "AMD gfx942", "0000:02:03.2", "/dev/dri/renderD129"),) == found.devices
    assert found.usable


def test_the_driver_in_the_kernel_has_no_version_of_its_own(fake):
    fake.amd(128)
    (fake.root / "sys/module/amdgpu/version").unlink()
    assert "1 x AMD gfx942, amdgpu driver" == fake.examine("rocm").reason


@pytest.mark.parametrize("path", ["/opt/rocm/lib/libamdhip64.so", "/venv/lib/python3.12/site/torch/lib/libamdhip64.so"])
def test_hip_is_found_where_rocm_and_where_torch_put_it(fake, path):
    fake.amd(128)
    (fake.root / "opt/rocm-6.4.1/lib/libamdhip64.so.6").unlink()
    fake.file(path)
    assert fake.examine("rocm").usable


@pytest.mark.parametrize(
    ("visible", "hiding"),
    [
        ({"ROCR_VISIBLE_DEVICES": ""}, "ROCR_VISIBLE_DEVICES=''"),
        ({"ROCR_VISIBLE_DEVICES": "-1"}, "ROCR_VISIBLE_DEVICES='-1'"),
        ({"HIP_VISIBLE_DEVICES": "-1"}, "HIP_VISIBLE_DEVICES='-1'"),
        ({"HIP_VISIBLE_DEVICES": "1"}, "HIP_VISIBLE_DEVICES='1'"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES='-1'"),
        ({"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='-1'"),
        # HIP's empty list is no list, and its own variable counts before CUDA's.
        ({"HIP_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": ""}, ""),
        ({"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "0"}, ""),
        ({"ROCR_VISIBLE_DEVICES": "GPU-deadbeef"}, ""),
    ],
)
def test_each_of_the_variables_that_hide_amd_gpus_is_read_as_its_runtime_reads_it(fake, visible, hiding):
    fake.amd(128)
    reason = f"1 x AMD gfx942, all hidden by {hiding}" if hiding else "1 x AMD gfx942, amdgpu driver 6.10.5"
    assert reason == fake.examine("rocm", **visible).reason


def test_a_cuda_build_of_torch_on_an_amd_machine_is_named(fake):
    fake.amd(128)
    fake.torch(CUDA_BUILD)
    usable, reason, remedy = told(fake.examine("rocm"))
    assert usable
    assert reason.endswith("; but the torch on the path is 2.8.0+cu128, built for CUDA 12.8")
    assert "Install a build of torch for rocm: https://pytorch.org/get-started/locally/" == remedy


# xpu


def test_a_machine_without_anything_of_intels_graphics_says_so(fake):
    found = fake.examine("xpu")
    assert (False, "no Intel device, driver or library is here") == told(found)[:2]
    assert found.remedy.endswith(XPU_GRANT)


def test_an_intel_driver_without_a_gpu_is_told_apart(fake):
    fake.file("/sys/module/i915/refcnt", "0")
    remedy = "See whether the bus has one (lspci -d 8086:) and what the driver says (dmesg)."
    assert (False, "i915 driver is loaded, but it has no Intel device", remedy) == told(fake.examine("xpu"))


def test_a_container_sees_the_intel_card_and_lacks_its_render_node(fake):
    fake.intel()
    (fake.root / "dev/dri/renderD128").unlink()
    expected = (False, "xe driver lists 1 GPU(s), but there is no /dev/dri/renderD128", XPU_GRANT)
    assert expected == told(fake.examine("xpu"))


def test_integrated_graphics_without_level_zero_is_not_usable(fake):
    fake.intel_card(driver="i915")
    fake.file("/dev/dri/renderD128")
    usable, reason, remedy = told(fake.examine("xpu"))
    expected = (False, "/dev/dri/renderD128 is here, but there is no libze_loader.so.1 in any library folder")
    assert expected == (usable, reason)
    assert "Level Zero" in remedy


def test_level_zero_without_a_gpu_is_an_image_on_the_wrong_machine(fake):
    fake.intel_library()
    expected = (False, "libze_loader.so.1 is here, but there is no Intel device and no driver", XPU_GRANT)
    assert expected == told(fake.examine("xpu"))


def test_a_machine_with_level_zero_is_usable(fake):
    fake.intel()
    found = fake.examine("xpu")
    assert (True, "1 x Intel GPU 0x56a0, xe driver", "") == told(found)
    assert (Device(0, "Intel GPU 0x56a0", "0000:00:02.0", "/dev/dri/renderD128"),) == found.devices


def test_the_cards_of_other_makers_and_of_other_drivers_are_not_intels(fake):
    fake.intel_card(0, 128, vendor="0x1002")
    fake.intel_card(1, 129, driver="vfio-pci")
    fake.intel_card(2, 130)
    for render in (128, 129, 130):
        fake.file(f"/dev/dri/renderD{render}")
    fake.intel_library()
    found = fake.examine("xpu")
    assert (Device(0, "Intel GPU 0x56a0", "0000:02:02.0", "/dev/dri/renderD130"),) == found.devices


def test_level_zero_is_found_in_the_python_installation(fake):
    fake.intel()
    (fake.root / "usr/lib/x86_64-linux-gnu/libze_loader.so.1").unlink()
    fake.file("/venv/lib/libze_loader.so.1")
    assert fake.examine("xpu").usable


@pytest.mark.parametrize(("mask", "usable"), [("-1", False), ("", True), ("0", True), ("0.1", True), ("3", True)])
def test_an_affinity_mask_hides_intel_gpus_only_when_it_surely_does(fake, mask, usable):
    # Whether 3 is a card or a tile of the first depends on ZE_FLAT_DEVICE_HIERARCHY.
    fake.intel()
    assert usable is fake.examine("xpu", ZE_AFFINITY_MASK=mask).usable


def test_a_cpu_build_of_torch_on_an_intel_machine_is_named(fake):
    fake.intel()
    fake.torch(CPU_BUILD)
    expected = "1 x Intel GPU 0x56a0, xe driver; but the torch on the path is 2.13.0+cpu, built for the CPU only"
    assert (True, expected) == told(fake.examine("xpu"))[:2]


# permission


@pytest.fixture
def locked() -> Iterator[Fake]:
    """A machine that is examined by a user who may not open what has mode 0; in a folder that everybody may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Fake(Path(folder))


def examined_by_nobody(fake: Fake, kind: str) -> PlatformReport:
    if os.geteuid() != 0:
        return fake.examine(kind)
    # The superuser may open everything, so it has to be somebody else for a moment.
    os.setresuid(65534, 65534, 0)
    try:
        return fake.examine(kind)
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("name", ["/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia0"])
def test_a_device_file_that_this_user_may_not_open_is_named(locked, name):
    locked.nvidia(0)
    (locked.root / name.lstrip("/")).chmod(0)
    for path in {"dev/nvidiactl", "dev/nvidia-uvm", "dev/nvidia0"} - {name.lstrip("/")}:
        (locked.root / path).chmod(0o666)
    found = examined_by_nobody(locked, "cuda")
    assert (False, f"{name} is here, but this user may not open it") == told(found)[:2]
    assert f"ls -l {name}" in found.remedy
    assert f"{name}: may not be opened by this user" in found.evidence


def test_one_gpu_that_may_be_opened_is_enough(locked):
    locked.nvidia(0, 1)
    for path in locked.root.glob("dev/*"):
        path.chmod(0o666)
    (locked.root / "dev/nvidia0").chmod(0)
    found = examined_by_nobody(locked, "cuda")
    assert (Device(0, "NVIDIA H100 80GB HBM3", "0000:28:00.0", "/dev/nvidia1"),) == found.devices
    assert found.usable


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_user_outside_the_groups_of_rocm_is_told_which_they_are(locked, mode):
    locked.amd(128)
    (locked.root / "dev/dri/renderD128").chmod(0o666)
    (locked.root / "dev/kfd").chmod(mode)
    found = examined_by_nobody(locked, "rocm")
    assert (False, "/dev/kfd is here, but this user may not open it") == told(found)[:2]
    assert "usermod -aG render,video USER" in found.remedy


def test_a_user_outside_the_group_of_intels_render_nodes_is_told_so(locked):
    locked.intel()
    (locked.root / "dev/dri/renderD128").chmod(0)
    assert "/dev/dri/renderD128 is here, but this user may not open it" == examined_by_nobody(locked, "xpu").reason


# cpu


def test_the_processor_is_always_usable_and_described(fake):
    fake.processor()
    expected = PlatformReport(
        "cpu",
        True,
        (Device(0, "Xeon 8480"),),
        ("/proc/cpuinfo: Xeon 8480 avx2 avx512f amx_tile", "/proc/meminfo: 32.0 GiB"),
        "2 x Xeon 8480",
    )
    assert expected == fake.examine("cpu")


def test_the_processors_that_this_process_may_use_count_when_they_are_known(fake):
    fake.processor()
    assert "1 x Xeon 8480" == examine("cpu", attrs.evolve(fake.machine(), processors=1)).reason


def test_an_arm_processor_without_a_name_shows_its_features(fake):
    fake.file("/proc/cpuinfo", "processor\t: 0\nFeatures\t: fp asimd sve svebf16\nCPU implementer\t: 0x41\n")
    found = fake.examine("cpu")
    assert (True, "1 x processor of unknown model") == (found.usable, found.reason)
    assert ("/proc/cpuinfo: processor of unknown model asimd sve",) == found.evidence


def test_a_machine_that_says_nothing_still_has_a_processor(fake):
    expected = (True, "1 x processor of unknown model", ())
    found = fake.examine("cpu")
    assert expected == (found.usable, found.reason, found.evidence)


# hostile files

READ = [
    "/proc/driver/nvidia/version",
    "/sys/module/nvidia/version",
    "/proc/driver/nvidia/gpus/0000:18:00.0/information",
    "/dev/nvidia0",
    "/dev/nvidiactl",
    "/usr/lib/libcuda.so.1",
    "/etc/ld.so.conf.d/a.conf",
    "/etc/nv_tegra_release",
    "/sys/module/amdgpu/version",
    "/sys/class/kfd/kfd/topology/nodes/1/gpu_id",
    "/sys/class/kfd/kfd/topology/nodes/1/properties",
    "/dev/kfd",
    "/dev/dri/renderD128",
    "/opt/rocm/lib/libamdhip64.so.6",
    "/sys/class/drm/card0/device/vendor",
    "/sys/class/drm/card0/device/uevent",
    "/usr/lib/libze_loader.so.1",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/venv/lib/python3.12/site/torch/version.py",
]
FOLDERS = ["/proc", "/dev", "/sys", "/usr", "/etc/ld.so.conf.d", "/opt", "/venv"]


def a_folder(place: Path) -> None:
    place.mkdir()


def a_pipe(place: Path) -> None:
    os.mkfifo(place)


def a_link_to_itself(place: Path) -> None:
    place.symlink_to(place)


def a_link_to_nothing(place: Path) -> None:
    place.symlink_to("/nonexistent/place")


def bytes_that_are_no_text(place: Path) -> None:
    place.write_bytes(bytes(range(256)) * 16)


def lines_of_nonsense(place: Path) -> None:
    keys = ("Model", "Device Minor", "gfx_target_version", "location_id", "drm_render_minor", "MemTotal", "model name")
    evil = "9" * 5000 + "\x1b[31m\u202e\x00"
    place.write_text(
        "\n".join(f"{key}{mark}{evil}" for key in keys for mark in (": ", " ", "=")) + "\n/\x00\n", "utf-8"
    )


def a_gibibyte_of_nothing(place: Path) -> None:
    with place.open("wb") as file:
        file.truncate(1 << 30)


HOSTILE = [
    a_folder,
    a_pipe,
    a_link_to_itself,
    a_link_to_nothing,
    bytes_that_are_no_text,
    lines_of_nonsense,
    a_gibibyte_of_nothing,
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", HOSTILE)
def test_whatever_stands_in_place_of_a_file_gives_a_report_fit_to_print(fake, make, kind):
    for path in READ:
        place = fake.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        make(place)
    found = fake.examine(
        kind, CUDA_VISIBLE_DEVICES="\x1b]0;\n" * 99, library_path=("/\x00", "relative", "/proc/cpuinfo")
    )
    texts = [
        found.reason,
        found.remedy,
        *found.evidence,
        *(text for d in found.devices for text in (d.name, d.address)),
    ]
    assert [] == [text for text in texts if len(text) > 200 or not text.isascii() or not text.isprintable()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [a_pipe, a_link_to_itself, bytes_that_are_no_text])
def test_whatever_stands_in_place_of_a_folder_gives_the_report_of_an_empty_machine(fake, tmp_path, make, kind):
    for path in FOLDERS:
        place = fake.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        make(place)
    assert Fake(tmp_path / "empty").examine(kind) == fake.examine(kind)


def test_what_stands_beyond_64_kib_of_a_file_is_not_read(fake):
    fake.file("/proc/driver/nvidia/version", "x" * 65_536 + NVRM_OPEN)
    assert "NVIDIA driver of unknown version is loaded, but it has no NVIDIA device" == fake.examine("cuda").reason


def test_a_driver_that_says_nothing_about_a_gpu_leaves_it_without_a_name(fake):
    fake.nvidia(0, 1)
    for bus in ("0000:18:00.0", "0000:28:00.0"):
        fake.file(f"/proc/driver/nvidia/gpus/{bus}/information", b"\xff\xfe")
    expected = (
        Device(0, "NVIDIA GPU", "0000:18:00.0", "/dev/nvidia0"),
        Device(1, "NVIDIA GPU", "0000:28:00.0", "/dev/nvidia1"),
    )
    assert expected == fake.examine("cuda").devices


def test_a_number_that_is_none_does_not_become_a_device_file(fake):
    fake.nvidia(0)
    text = GPU_INFORMATION.format(bus="0000:18:00.0", minor="ctl")
    fake.file("/proc/driver/nvidia/gpus/0000:18:00.0/information", text)
    assert ("/dev/nvidia0",) == tuple(device.file for device in fake.examine("cuda").devices)


def test_thousands_of_gpus_make_a_short_report(fake):
    fake.nvidia(*range(600))
    found = fake.examine("cuda")
    assert 256 == len(found.devices)
    assert "256 x NVIDIA H100 80GB HBM3, NVIDIA driver 570.86.15" == found.reason


# torch


@pytest.mark.parametrize(
    ("text", "build", "platform", "cuda_major"),
    [
        (CPU_BUILD, TorchBuild("2.13.0+cpu"), "cpu", None),
        (CUDA_BUILD, TorchBuild("2.8.0+cu128", cuda="12.8"), "cuda", 12),
        (ROCM_BUILD, TorchBuild("2.8.0+rocm6.4", hip="6.4.43482-0f2d60242"), "rocm", None),
        (XPU_BUILD, TorchBuild("2.8.0+xpu", xpu="20250101"), "xpu", None),
        ('__version__ = "2.10.0"\ncuda = "13.0"\n', TorchBuild("2.10.0", cuda="13.0"), "cuda", 13),
        ("__version__ = '2.10.0'\ncuda = 'new'\n", TorchBuild("2.10.0", cuda="new"), "cuda", None),
    ],
)
def test_how_torch_was_built_is_read_from_its_text(tmp_path, text, build, platform, cuda_major):
    Fake(tmp_path).file("/torch/version.py", text)
    found = torch_build((str(tmp_path),))
    assert (build, platform, cuda_major) == (found, found.platform, found.cuda_major)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff" * 999,
        b"version = 1\n",
        b"__version__ = None\n",
        b"__version__ = open('/etc/passwd').read()\n",
        b"# __version__ = '1.0'\n",
        b"__version__" * 9999,
        b"(" * 65_000,
        b"cuda:" + b" " * 65_000,
    ],
)
def test_a_torch_that_does_not_say_how_it_was_built_is_none(tmp_path, content):
    Fake(tmp_path).file("/torch/version.py", content)
    started = time.process_time()
    assert None is torch_build((str(tmp_path),))
    assert time.process_time() - started < 1


def test_the_first_torch_on_the_path_counts(tmp_path):
    Fake(tmp_path / "a" / "torch").file("no_version.txt")
    Fake(tmp_path / "b").file("/torch/version.py", ROCM_BUILD)
    Fake(tmp_path / "c").file("/torch/version.py", CUDA_BUILD)
    found = torch_build(tuple(str(tmp_path / name) for name in ("missing", "a", "b", "c")))
    assert "rocm" == found.platform


def test_a_torch_that_hides_another_is_the_one_that_an_import_gets(tmp_path):
    Fake(tmp_path / "a").file("/torch/version.py", "import nothing\n")
    Fake(tmp_path / "b").file("/torch/version.py", CUDA_BUILD)
    assert None is torch_build((str(tmp_path / "a"), str(tmp_path / "b")))


def test_without_a_path_torch_is_looked_for_where_python_would(site):
    assert None is torch_build([str(site.path)])
    Fake(site.path).file("/torch/version.py", CUDA_BUILD)
    assert TorchBuild("2.8.0+cu128", cuda="12.8") == torch_build()


# the report of this process


@pytest.fixture
def here(fake, monkeypatch) -> Fake:
    """A fake machine that this process takes for its own."""
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: fake.machine()))
    return fake


@pytest.fixture
def stuck(here, monkeypatch) -> Iterator[threading.Event]:
    """A machine on which looking at anything blocks until the event is set."""
    answers = threading.Event()
    below = Machine.below

    def slow(self: Machine, path: str) -> Path:
        answers.wait(60)
        return below(self, path)

    monkeypatch.setattr(Machine, "below", slow)
    yield answers
    answers.set()


def test_a_report_is_made_once_until_it_is_forgotten(here):
    before = report("cuda")
    here.nvidia(0)
    assert before is report("cuda")
    platforms.forget()
    assert (False, True) == (before.usable, report("cuda").usable)


def test_a_refresh_looks_at_the_machine_again(here, monkeypatch):
    monkeypatch.setattr(plugins, "_host", None)
    before = report("cuda")
    here.nvidia(0)
    plugins.refresh()
    assert (False, True) == (before.usable, report("cuda").usable)


def test_threads_that_ask_at_once_share_one_examination(here, stuck, monkeypatch):
    machines: list[Machine] = []
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: machines.append(here.machine()) or machines[-1]))
    reports: list[PlatformReport] = []
    threads = [threading.Thread(target=lambda: reports.append(report("cuda", 30))) for _ in range(8)]
    for thread in threads:
        thread.start()
    stuck.set()
    for thread in threads:
        thread.join(30)
    assert (1, 8, 1) == (len(machines), len(reports), len({id(found) for found in reports}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_driver_that_does_not_answer_gives_a_report_that_says_so(stuck, kind):
    started = time.monotonic()
    found = report(kind, seconds=0.1)
    assert time.monotonic() - started < 10
    assert (False, "its files did not answer within 0.1 s: a driver may be stuck") == told(found)[:2]
    assert (kind, (), ()) == (found.kind, found.devices, found.evidence)
    assert "dmesg" in found.remedy


def test_a_late_answer_is_taken_when_it_comes(here, stuck):
    here.nvidia(0)
    assert not report("cuda", seconds=0.05).usable
    threads = set(threading.enumerate())
    assert not report("cuda", seconds=0.05).usable
    assert set(threading.enumerate()) <= threads, "a second thread is stuck beside the first"
    stuck.set()
    assert report("cuda", seconds=30).usable


def test_what_was_forgotten_while_it_was_late_is_asked_again(here, stuck, monkeypatch):
    assert not report("cuda", seconds=0.05).usable
    monkeypatch.undo()
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: here.machine()))
    here.nvidia(0)
    platforms.forget()
    assert report("cuda", seconds=30).usable


def test_a_forked_child_does_not_wait_for_a_thread_that_stayed_behind(site):
    done = site.python(
        """
        import os, threading
        from tensorway.platforms import Machine, report
        text = Machine.text
        Machine.text = lambda self, path: threading.Event().wait(60) and ""
        assert "did not answer" in report("cpu", 0.05).reason
        child = os.fork()
        if child == 0:
            Machine.text = text
            os._exit(0 if report("cpu", 20).usable else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert "0" == done.stdout.strip(), done.stderr


def test_a_driver_that_is_stuck_does_not_keep_the_process_from_exiting(site):
    done = site.python(
        """
        import threading
        from tensorway.platforms import Machine, report
        Machine.text = lambda self, path: threading.Event().wait(600) and ""
        print(report("cpu", 0.05).reason)
        """,
        timeout=40,
    )
    assert "its files did not answer within 0.05 s: a driver may be stuck" == done.stdout.strip(), done.stderr


def test_an_examination_that_raises_raises_in_whoever_asks(here, monkeypatch):
    def broken(self: Machine, path: str) -> str:
        raise ZeroDivisionError("a defect of ours")

    monkeypatch.setattr(Machine, "text", broken)
    with pytest.raises(ZeroDivisionError, match="a defect of ours"):
        report("cuda")


@pytest.mark.parametrize("ask", [report, lambda kind: examine(kind, Machine())])
def test_a_platform_that_there_is_not_is_refused(ask):
    with pytest.raises(BackendNotFound) as caught:
        ask("tpu")
    expected = ("platform 'tpu' was to be examined.", "There are: cuda, rocm, xpu, cpu.", "Use one of these.")
    assert expected == caught.value.args


def test_this_machine_is_described_by_its_environment(monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/a::/opt/b")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("HIP_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "path", ["", "relative", "/opt/site"])
    here = Machine.here()
    # What is relative belongs to no root.
    assert (Path("/"), ("/opt/a", "/opt/b"), ("/opt/site",)) == (here.root, here.library_path, here.python_path)
    assert ("", None) == (here.visible["CUDA_VISIBLE_DEVICES"], here.visible["HIP_VISIBLE_DEVICES"])
    assert len(os.sched_getaffinity(0)) == here.processors


def test_a_boot_is_the_same_for_every_process_that_it_has(site):
    done = site.python("from tensorway import platforms; print(platforms.boot_id())")
    assert platforms.boot_id() == done.stdout.strip()
    assert re.fullmatch("[0-9a-f-]{36}", platforms.boot_id())


def test_examining_opens_no_device_loads_no_library_and_imports_no_package(site, fake):
    # Importing any of these would end the process.
    for name in ("torch", "pynvml", "amdsmi"):
        (site.path / name).mkdir()
        site.module(f"{name}/__init__", "raise SystemExit('imported')")
    (site.path / "torch" / "version.py").write_text(CPU_BUILD)
    fake.nvidia(0)
    fake.amd(128)
    fake.intel_card(1, 129)
    fake.file("/dev/dri/renderD129")
    fake.intel_library()
    done = site.python(
        f"""
        import json, sys
        opened, loaded = [], []
        def watch(event, arguments):
            if event == "open" and isinstance(arguments[0], (str, bytes)):
                opened.append(str(arguments[0]))
            elif event.startswith("ctypes.dlopen"):
                loaded.append(str(arguments))
        sys.addaudithook(watch)
        import attrs, pathlib
        from tensorway import platforms
        fake = attrs.evolve(platforms.Machine.here(), root=pathlib.Path({str(fake.root)!r}), visible={{}})
        kinds = ("cuda", "rocm", "xpu", "cpu")
        usable = [platforms.examine(kind, fake).usable for kind in kinds]
        for kind in kinds:
            platforms.report(kind)
        modules = sorted({{"torch", "pynvml", "amdsmi", "ctypes"}} & set(sys.modules))
        devices = [path for path in opened if "/dev/" in path and not path.startswith("/dev/null")]
        read = any(path.endswith("proc/driver/nvidia/version") for path in opened)
        print(json.dumps([usable, modules, devices, loaded, read]))
        """
    )
    assert [[True] * 4, [], [], [], True] == json.loads(done.stdout or "null"), done.stderr


def test_importing_reads_nothing_of_the_machine(site):
    done = site.python(
        """
        import sys
        import attrs, concurrent.futures, pathlib, tensorway.types, tensorway.settings, tensorway.errors
        before, threads, machine = [], [], ("/proc", "/sys", "/dev", "/etc")
        def watch(event, arguments):
            if event in ("open", "os.scandir", "os.listdir"):
                before.extend(path for path in map(str, arguments[:1]) if path.startswith(machine))
            elif event == "_thread.start_new_thread":
                threads.append(event)
        sys.addaudithook(watch)
        import tensorway.platforms
        print(before, threads)
        """
    )
    assert "[] []" == done.stdout.strip(), done.stderr


# the hooks


@pytest.mark.parametrize("kind", KINDS)
def test_each_hook_satisfies_the_contract(kind):
    hook = getattr(platforms, kind)
    offer = check_offer(check_hook(hook, "platform")(ctx=CONTEXT), "platform", kind)
    assert (frozenset({kind}), "host") == (offer.devices, offer.probe_in)


def offers() -> list:
    return [getattr(platforms, kind)(CONTEXT) for kind in KINDS]


def test_an_accelerator_goes_before_the_processor():
    assert ["cuda", "rocm", "xpu", "cpu"] == [o.name for o in sorted(offers(), key=lambda offer: -offer.priority)]


def test_on_a_machine_without_accelerator_auto_is_the_processor(here):
    here.processor()
    with isolated(offers()) as host:
        assert report("cpu") is host.create("platform")
        assert "2 x Xeon 8480" == host.create("platform").reason


@pytest.mark.parametrize("kind", ["cuda", "rocm", "xpu"])
def test_on_a_machine_with_one_accelerator_auto_is_that(here, kind):
    {"cuda": here.nvidia, "rocm": here.amd}.get(kind, lambda *_: here.intel())(128)
    with isolated(offers()) as host:
        assert kind == host.create("platform").kind


def test_an_accelerator_that_was_asked_for_by_name_is_refused_with_reason_and_remedy(here):
    here.nvidia_files(0)
    with isolated(offers()) as host, pytest.raises(BackendUnavailable) as caught:
        host.create("platform", "cuda")
    assert "/dev/nvidia0 is here, but there is no libcuda.so.1 in any library folder" in caught.value.true
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility" in caught.value.to_do


def test_a_probe_tells_what_was_measured(here):
    here.nvidia_files(0, 1)
    here.nvidia_library()
    found = platforms.cuda(CONTEXT).probe()
    expected = {
        "devices": 2,
        "names": "NVIDIA GPU, NVIDIA GPU",
        "evidence": "/dev/nvidiactl: may be opened; /dev/nvidia-uvm: may be opened; /dev/nvidia0: may be opened; "
        "/dev/nvidia1: may be opened; libcuda.so.1: /usr/lib/x86_64-linux-gnu/libcuda.so.1",
    }
    assert (True, "2 x NVIDIA GPU", "", expected) == (found.usable, found.reason, found.remedy, dict(found.facts))
