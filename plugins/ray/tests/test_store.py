"""The suite on a real cluster, and what is particular to it: the actor that is found, that dies, that is told apart."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

import tensorway
import tensorway_ray
from tensorway.errors import BackendUnavailable, Closed, DeadlineExceeded, Unauthenticated
from tensorway.rendezvous import Directory
from tensorway.testing import ServedRendezvousSuite
from tensorway.testing.rendezvous import SLACK, TTL, collect
from tensorway.testing.waiting import eventually
from tensorway_ray import store as ray_store


class Actor:
    """The process of a rendezvous' actor, as the suite harms a server; who starts it again is whoever misses it."""

    def __init__(self, ray, options):
        self.options = options
        with tensorway.create("rendezvous", "ray", options):
            self._actor = ray.get_actor(options["name"], "tensorway")
        self._ray = ray

    def kill(self):
        os.kill(self.pid(), signal.SIGKILL)

    def start(self):
        """Nobody has to."""

    def pid(self):
        def own(_self):
            return os.getpid()

        self._actor = self._ray.get_actor(self.options["name"], "tensorway")
        return self._ray.get(self._actor.__ray_call__.remote(own), timeout=30)

    def pause(self):
        self.paused = self.pid()
        os.kill(self.paused, signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{self.paused}/stat").read_text().rpartition(")")[2].split()[0] == "T", 10)

    def resume(self):
        os.kill(self.paused, signal.SIGCONT)


def options(cluster):
    # The nodes are all on this machine, whose loopback reaches every one of them.
    return {"name": uuid.uuid4().hex, "host": "loopback", "cluster": cluster.address}


class TestRay(ServedRendezvousSuite):
    name = "ray"

    @pytest.fixture(scope="class")
    def shared(self, ray, cluster):
        given = options(cluster)
        yield given
        tensorway_ray.end(given["name"])

    @pytest.fixture
    def options(self, shared):
        return shared

    def entrance(self, server):
        return server.options

    @pytest.fixture
    def server(self, ray, cluster):
        server = Actor(ray, options(cluster))
        yield server
        tensorway_ray.end(server.options["name"])


def test_ten_who_miss_it_at_once_make_one_and_members_publish_again(ray, cluster):
    given = options(cluster)
    server = Actor(ray, given)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(tensorway.create("rendezvous", "ray", given)) for _ in range(10)]
        ends = [stack.enter_context(tensorway.create("transport", "local", {"name": f"m{n}"})) for n in range(2)]
        members = [stack.enter_context(Directory(clients[n], ends[n], f"m{n}", ttl=3)) for n in range(2)]
        for each in members:
            each.live()
        members[0].connect("m1", 20)
        before = server.pid()
        server.kill()
        with concurrent.futures.ThreadPoolExecutor(10) as pool:
            list(pool.map(lambda client: client.put("/x", b"x", deadline=60), clients))

        assert len({client.address for client in clients}) == 1
        assert server.pid() != before
        eventually(lambda: len(clients[9].list("/default/")) == 2, 30)
        assert members[1].connect("m0", 20).name == "m0"
        # What both knew of each other outlived the rendezvous.
        assert members[0].connect("m1", 20).lost == ""
    tensorway_ray.end(given["name"])


def test_it_lives_on_when_who_made_it_has_closed(ray, cluster):
    given = options(cluster)
    with tensorway.create("rendezvous", "ray", given) as first:
        first.put("/a", b"1")
        address = first.address
    with tensorway.create("rendezvous", "ray", given) as second:
        assert (second.address, second.get("/a").value) == (address, b"1")
    assert tensorway_ray.end(given["name"]) is True
    assert tensorway_ray.end(given["name"]) is False


def test_who_has_no_secret_of_it_is_refused(ray, cluster):
    given = options(cluster)
    with tensorway.create("rendezvous", "ray", given) as entered:
        stranger = {"address": entered.address, "secret": "a guess of sixteen letters"}
        with tensorway.create("rendezvous", "direct", stranger) as outside, pytest.raises(Unauthenticated):
            outside.get("/a", deadline=10)
    tensorway_ray.end(given["name"])


def test_a_policy_without_an_answer_on_its_node_is_told_in_time_and_frees_the_name(ray, cluster):
    given = {**options(cluster), "host": "iface:nowhere0"}
    with pytest.raises(BackendUnavailable, match="nowhere0"):
        tensorway.create("rendezvous", "ray", given)
    with tensorway.create("rendezvous", "ray", {**given, "host": "loopback"}) as entered:
        assert entered.get("/a") is None
    tensorway_ray.end(given["name"])


def test_a_name_that_another_actor_has_is_refused(ray, cluster):
    class Other:
        def entrance(self):
            return "come in"

    name = uuid.uuid4().hex
    other = ray.remote(Other).options(name=name, namespace="tensorway", num_cpus=0).remote()
    with pytest.raises(BackendUnavailable, match="answers str"):
        tensorway.create("rendezvous", "ray", {**options(cluster), "name": name})
    ray.kill(other)


def test_what_an_actor_put_goes_with_its_lease_when_ray_kills_it(ray, cluster):
    given = options(cluster)

    class Member:
        def put(self, key):
            import tensorway
            import tensorway_ray

            tensorway_ray.enter()
            self.client = tensorway.create("rendezvous", "ray", given)
            return self.client.put(key, b"here", lease=self.client.lease(TTL))

    with tensorway.create("rendezvous", "ray", given) as entered, entered.watch("/m/") as watch:
        member = ray.remote(Member).options(num_cpus=0, resources={"node3": 0.1}).remote()
        assert ray.get(member.put.remote("/m/a"), timeout=120) > 0
        time.sleep(2 * TTL)
        assert entered.get("/m/a").value == b"here"
        ray.kill(member)
        eventually(lambda: entered.get("/m/a") is None, TTL + SLACK)
        assert [event.kind for event in collect(watch, 2)] == ["put", "expired"]
    tensorway_ray.end(given["name"])


class Direct:
    """A client of a service that does not answer."""

    def __init__(self, address="", secret=""):
        self.closed = 0

    def get(self, key, seconds):
        if self.closed:
            raise Closed("The rendezvous was asked to get.", "It is closed.", "Enter it again.")
        raise DeadlineExceeded("The rendezvous was asked to get.", "Nothing answered.", "Wait.")

    def close(self):
        self.closed += 1


def test_who_closes_does_not_wait_for_one_who_looks_for_the_actor_and_nothing_is_left_open(monkeypatch):
    entrance, made = SimpleNamespace(address="", secret=""), []
    looking, found = threading.Event(), threading.Event()

    def direct(address, secret):
        made.append(Direct())
        return made[-1]

    def find(options, seconds):
        if made:
            looking.set()
            assert found.wait(30)
        return None, entrance

    monkeypatch.setattr(ray_store, "DirectStore", direct)
    monkeypatch.setattr(ray_store, "keeper", SimpleNamespace(find=find, alive=lambda actor, seconds: False))
    store, ends = ray_store.RayStore(SimpleNamespace(deadline=1.0)), []

    def get():
        try:
            store.get("/k", 30)
        except Closed as error:
            ends.append(error)

    other = threading.Thread(target=get)
    other.start()
    try:
        assert looking.wait(30)
        closing = threading.Thread(target=store.close)
        closing.start()
        closing.join(5)
        assert not closing.is_alive()
    finally:
        found.set()
        other.join(30)
    assert 1 == len(ends) and 2 == len(made) and all(each.closed for each in made)
