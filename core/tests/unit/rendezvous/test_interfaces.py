"""What interfaces have, on a tree of the kernel's that we make, and on a real one of our own."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tensorway.rendezvous.interfaces import rdma_devices


@pytest.fixture
def sysfs(tmp_path):
    """Interfaces as the kernel shows them: name -> (devices, port, those below)."""

    def make(**interfaces):
        for name, (devices, port, below) in interfaces.items():
            place = tmp_path / name.replace("_", ".")
            place.mkdir()
            for device in devices:
                (place / "device" / "infiniband" / device).mkdir(parents=True)
            if port:
                (place / "dev_port").write_text(port)
            for other in below:
                (place / f"lower_{other}").mkdir()
        return tmp_path

    return make


def test_the_device_behind_an_interface_is_told_with_its_port(sysfs):
    tree = sysfs(ib0=(["mlx5_0"], "0\n", []), ib1=(["mlx5_0"], "1\n", []), eth0=([], "0\n", []))
    assert [["mlx5_0:1"], ["mlx5_0:2"], []] == [rdma_devices(name, tree) for name in ("ib0", "ib1", "eth0")]


def test_a_vlan_on_a_bond_has_the_devices_below_it(sysfs):
    tree = sysfs(
        bond0_118=([], "0\n", ["bond0"]),
        bond0=([], "0\n", ["eth0", "eth1"]),
        eth0=(["mlx5_bond_0"], "0\n", []),
        eth1=(["mlx5_bond_0"], "0\n", []),
    )
    assert ["mlx5_bond_0:1"] == rdma_devices("bond0.118", tree)


@pytest.mark.parametrize("port", ["", "x\n", "-\n"])
def test_a_card_that_does_not_say_its_port_has_one(sysfs, port):
    assert ["mlx5_0:1"] == rdma_devices("ib0", sysfs(ib0=(["mlx5_0"], port, [])))


@pytest.mark.parametrize("name", ["", "eth9", "../ib0", "/"])
def test_what_is_no_interface_has_no_devices(sysfs, name):
    (tree := sysfs(ib0=(["mlx5_0"], "", [])) / "below").mkdir()
    assert [] == rdma_devices(name, tree)


def test_an_address_with_a_label_is_one_of_its_interface():
    script = (
        "ip link set lo up && ip addr add 10.99.0.1/32 dev lo label lo:one && "
        f"{sys.executable} -c 'from tensorway.rendezvous.interfaces import local_addresses as a; print(*a())'"
    )
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs unshare and ip: apt-get install util-linux iproute2")
    new = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*new, "true"], capture_output=True, timeout=30).returncode:
        pytest.skip("needs user namespaces, which this kernel or container does not allow")
    done = subprocess.run([*new, "sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert "127.0.0.1/lo 10.99.0.1/lo ::1/lo" == done.stdout.strip(), done.stderr
