"""What a Ray driver on a host of these tests is told to do; each function has the process's `Rank` first.

Actors' classes are made within functions: so Ray sends the classes themselves, and nodes need not have this file.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from types import SimpleNamespace

#: What this process has made.
here = SimpleNamespace()

BLOCK = 65_536
TRANSPORT = {"ucx_tls": ["tcp"], "host": "runtime"}


def enter(_, address, job=()):
    """Enter the cluster on this host's address; these variables of ours are the job's, too."""
    import ray

    from tensorway.rendezvous.hosts import choose

    environment = {"env_vars": {name: os.environ[name] for name in job}}
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": None}
    ray.init(address=address, _node_ip_address=choose("iface:eth0").address, runtime_env=environment, **quiet)
    here.ray = ray
    return len(ray.nodes())


def _on(host, **options):
    """What places an actor on a host."""
    return {"resources": {host: 0.1}, "num_cpus": 0, **options}


# -- what a driver exports


def side_channels(_, names, hosts):
    """On each of these hosts, what an actor says it dropped, and where its engines listen, which take what is set."""
    import tensorway_ray

    class Engine:
        def listen(self):
            import errno
            import logging
            import socket

            import tensorway_ray

            said = []
            handler = logging.Handler()
            handler.emit = lambda record: said.append(record.getMessage())
            logging.getLogger("tensorway").addHandler(handler)
            tensorway_ray.enter()
            listens = {}
            for name in names:
                try:
                    with socket.create_server((os.environ.get(name, "0.0.0.0"), 0)) as listener:
                        listens[name] = listener.getsockname()[0]
                except OSError as error:
                    listens[name] = errno.errorcode[error.errno]
            return listens, said

    environment = tensorway_ray.runtime_env()
    made = here.ray.remote(Engine)
    engines = [made.options(runtime_env=environment, **_on(host)).remote() for host in hosts]
    return here.ray.get([engine.listen.remote() for engine in engines], timeout=60)


# -- engines that find each other


def _member():
    class Member:
        def __init__(self, rank, ttl):
            import tensorway
            import tensorway_ray

            tensorway_ray.enter()
            self.memory = bytearray([rank]) * BLOCK
            self.endpoint = tensorway.create("transport", "nixl", {"name": f"m{rank}", **TRANSPORT})
            self.endpoint.register(self.memory)
            self.directory = tensorway.rendezvous.Directory(
                tensorway.create("rendezvous", "ray"), self.endpoint, f"m{rank}", ttl=ttl
            )
            self.directory.live()

        def read(self, other):
            import ray

            import tensorway

            peer = self.directory.connect(f"m{other}", deadline=30)
            here, there = tensorway.memory.Region.of(self.memory), peer.regions[0]
            table = tensorway.transport.BlockTable.over
            route = self.endpoint.prepare(peer, table(here, BLOCK // 2), table(there, BLOCK // 2))
            self.endpoint.read(route, [0], [1], deadline=30).wait()
            return peer.lane, self.memory[0], self.memory[-1], ray.util.get_node_ip_address()

    return Member


def start(_, count, ttl):
    """One member on each node; the nodes' addresses."""
    import tensorway_ray

    here.ttl = ttl
    here.places = tensorway_ray.one_per_node(count, {"CPU": 2}, deadline=30)
    here.members = {}
    member, environment = here.ray.remote(_member()), tensorway_ray.runtime_env()
    for rank in range(count):
        here.members[rank] = member.options(runtime_env=environment, **here.places.options(rank)).remote(rank, ttl)
    here.ray.get([each.__ray_ready__.remote() for each in here.members.values()], timeout=60)
    here.places.follow(list(here.members.values()))
    return here.places.addresses


def start_again(_, rank, host):
    """This member anew, on a host."""
    member = here.ray.remote(_member()).options(**_on(host))
    here.members[rank] = member.remote(rank, here.ttl)
    here.ray.get(here.members[rank].__ray_ready__.remote(), timeout=60)


def read(_, rank, other):
    """Let a member read another one's memory."""
    return here.ray.get(here.members[rank].read.remote(other), timeout=60)


def kill(_, *ranks):
    """Let Ray kill members."""
    for rank in ranks:
        here.ray.kill(here.members[rank])


def present(_):
    """Who is in the rendezvous, and where that is."""
    import tensorway
    import tensorway_ray

    if not hasattr(here, "rendezvous"):
        tensorway_ray.enter()
        here.rendezvous = tensorway.create("rendezvous", "ray")
    names = sorted(record.key.rpartition("/")[2] for record in here.rendezvous.list("/"))
    return names, here.rendezvous.address.rpartition(":")[0]


def free(_):
    """Processors that nobody has."""
    return here.ray.available_resources().get("CPU", 0)


# -- tensors


def register(_, seconds):
    """Offer NIXL over TCP to Ray, and place an actor on each of the hosts 2 and 3."""
    import tensorway_ray

    here.seconds = seconds
    here.label = tensorway_ray.register("tw", "nixl", TRANSPORT, seconds=seconds)

    class Holder:
        def __init__(self):
            import tensorway_ray

            tensorway_ray.enter()

        def make(self, seed, count):
            import torch

            return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))

        def digest(self, tensor):
            import hashlib

            return hashlib.blake2b(tensor.numpy()).hexdigest()

        def connections(self):
            ours = set()
            for each in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):  # closed by another thread
                    ours.add(os.readlink(each))
            rows = [row.split() for row in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
            return sum(row[3] == "01" and f"socket:[{row[9]}]" in ours for row in rows)

        def put(self, seed, count, label):
            import ray

            return [ray.put(self.make(seed, count), _tensor_transport=label)]

        def take(self, references, count, seconds):
            """Fetch into memory that is full of fives: what is raised, after how long, and how many are no fives."""
            import ray
            import torch

            self.target = torch.full((count,), 5, dtype=torch.uint8)
            ray.experimental.set_target_for_ref(references[0], [self.target])
            began = time.monotonic()
            try:
                ray.get(references[0], timeout=seconds)
                error = None
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
            return error, time.monotonic() - began, self.written()

        def written(self):
            return int((self.target != 5).sum())

        def held(self):
            return self.digest(self.target)

    made = here.ray.remote(enable_tensor_transport=True)(Holder)
    here.holders = {host: made.options(**_on(host)).remote() for host in ("host2", "host3")}
    here.ray.get([each.__ray_ready__.remote() for each in here.holders.values()], timeout=60)


def passed(_, seed, count):
    """Let host 3 digest a tensor that host 2 makes."""
    one, two = here.holders["host2"], here.holders["host3"]
    reference = one.make.options(tensor_transport=here.label).remote(seed, count)
    return here.ray.get(two.digest.remote(reference), timeout=60)


def connections(_):
    """How many TCP connections host 3's actor has, Ray's own among them."""
    return here.ray.get(here.holders["host3"].connections.remote(), timeout=30)


def digest(_, seed, count):
    """What the tensor of this seed is."""
    import hashlib

    import torch

    made = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return hashlib.blake2b(made.numpy()).hexdigest()


def put(_, seed, count):
    """Let host 2 make a tensor and keep it, and host 3 connect to it."""
    here.kept = here.ray.get(here.holders["host2"].put.remote(seed, count, here.label), timeout=60)


def take(_, count, seconds):
    """Let host 3 fetch it into memory of its own; what `Holder.take` says."""
    return here.ray.get(here.holders["host3"].take.remote(here.kept, count, seconds), timeout=100)


def written(_):
    """How many bytes of that memory have been written to."""
    return here.ray.get(here.holders["host3"].written.remote(), timeout=30)


def held(_):
    """What is in that memory."""
    return here.ray.get(here.holders["host3"].held.remote(), timeout=30)
