"""Engines without models for the scenarios beside; each scenario ends with nobody holding anything."""

from __future__ import annotations

import random

import pytest

#: vLLM and numpy warn of what is not ours, in whichever test uses them first.
QUIET = ["ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"]
_HELD = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "lifecycle":
            item.add_marker(pytest.mark.timeout(300))
            for each in QUIET:
                item.add_marker(pytest.mark.filterwarnings(each))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.stash[_HELD] = report.passed
    return report


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    return make(tmp_path_factory.mktemp("lifecycle"))


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    from tensorway_vllm.testing.tiny import make

    return make(tmp_path_factory.mktemp("lifecycle"), "gemma2")


@pytest.fixture(scope="session")
def meeting():
    from tensorway_vllm.testing.scheduling import Meeting

    made = Meeting()
    yield made
    made.close()


@pytest.fixture(scope="session")
def fabrics():
    from tensorway_vllm.testing.faulty import faulty

    return faulty()


@pytest.fixture
def engines(request):
    """Of the test; after one that held, they go on until they rest, and then nobody may hold anything."""
    from tensorway_vllm.testing.scheduling import settled

    made = []
    yield made
    try:
        if request.node.stash.get(_HELD, False):
            settled(*made)
            assert [one.leaks() for one in made] == ["" for _ in made]
    finally:
        for one in reversed(made):
            one.close()


@pytest.fixture
def pair(model, meeting, fabrics, engines):
    """Makes a prefilling and a decoding engine."""
    from tensorway_vllm.testing.scheduling import Pair

    def make(faulty=False, model=model, **options):
        made = Pair(model, meeting, fabrics=fabrics if faulty else None, **options)
        engines.extend((made.prefill, made.decode))
        return made

    return make


@pytest.fixture
def engine(model, engines):
    """Makes one engine."""
    from tensorway_vllm.testing.scheduling import Engine

    def make(kv, model=model, **options):
        made = Engine(model, kv, **options)
        engines.append(made)
        return made

    return make


@pytest.fixture
def words(request):
    """Prompts that no other test has."""
    numbers = random.Random(request.node.nodeid)

    def prompt(count):
        return [numbers.randrange(4, 2000) for _ in range(count)]

    return prompt
