"""A native library gets in late, once, and its absence is remembered too."""

from __future__ import annotations

import importlib.abc
import logging
import os
import sys
import threading

import pytest

from tensorway import native
from tensorway.errors import BackendUnavailable
from tensorway.native import Absent, Loaded, NativeLibrary

SYMBOLS = {"Agent": "_api:nixl_agent", "Telemetry": "_bindings:telemetry"}


def package(site, name: str, api: str = "nixl_agent = 'the agent'", top: str = "") -> None:
    folder = site.path / name
    folder.mkdir()
    (folder / "__init__.py").write_text(top)
    (folder / "_api.py").write_text(api)
    (folder / "_bindings.py").write_text("telemetry = 'the telemetry'")


def library(*modules: str, **fields) -> NativeLibrary:
    return NativeLibrary("NIXL", modules or ("fake_cu13", "fake_cu12"), SYMBOLS, "Install it.", **fields)


@pytest.fixture
def finder(monkeypatch):
    """Counts how often Python looks for our fake packages."""

    class Counter(importlib.abc.MetaPathFinder):
        asked: list[str] = []

        def find_spec(self, name, path, target=None):
            if name.startswith("fake_"):
                self.asked.append(name)

    counter = Counter()
    monkeypatch.setattr(sys, "meta_path", [counter, *sys.meta_path])
    counter.asked.clear()
    return counter


def test_declaring_a_library_imports_nothing(site, finder):
    package(site, "fake_cu13")
    library()
    assert ([], False) == (finder.asked, "fake_cu13" in sys.modules)


def test_the_first_package_that_is_there_gives_the_symbols(site):
    package(site, "fake_cu12")
    assert Loaded("fake_cu12", {"Agent": "the agent", "Telemetry": "the telemetry"}) == library().result()


def test_a_package_that_does_not_load_is_passed_over_for_one_that_does(site):
    package(site, "fake_cu13", top="raise OSError('libcudart.so.13: cannot open shared object file')")
    package(site, "fake_cu12")
    assert "fake_cu12" == library().result().module


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ("raise OSError('libnixl.so: no such file')", "does not load (OSError: libnixl.so: no such file)"),
        ("raise SystemExit(3)", "does not load (SystemExit: 3)"),
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("1/0", "ZeroDivisionError"),
    ],
)
def test_a_broken_library_is_absent_with_the_reason(site, top, words):
    package(site, "fake_cu12", top=top)
    result = library("fake_cu12").result()
    assert isinstance(result, Absent)
    assert words in result.reason


def test_a_package_of_another_shape_is_not_the_library(site):
    package(site, "fake_cu12", api="something_else = 1")
    assert "has no attribute 'nixl_agent'" in library("fake_cu12").result().reason


def test_absence_is_remembered_and_never_looked_for_again(finder):
    absent = library()
    for _ in range(100):
        assert "fake_cu13 is not installed; fake_cu12 is not installed" == absent.result().reason
    assert ["fake_cu13", "fake_cu12"] == finder.asked


def test_what_failed_can_be_forgotten_and_what_worked_stays(site):
    absent, present = library("fake_late"), library("fake_cu12")
    package(site, "fake_cu12")
    assert isinstance(absent.result(), Absent)
    loaded = present.result()
    package(site, "fake_late")
    importlib.invalidate_caches()
    native.forget_failures()
    assert isinstance(absent.result(), Loaded)
    assert loaded is present.result()


def test_reading_a_symbol_of_an_absent_library_raises_its_reason_every_time():
    absent = library()
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="fake_cu13 is not installed"):
            absent.symbol("Agent")


def test_lazy_attributes_load_the_library_when_the_first_is_read(site):
    package(site, "fake_cu12")
    attribute = native.lazy_attributes(library("fake_cu12"), "some.module")
    assert "fake_cu12" not in sys.modules
    assert "the agent" == attribute("Agent")
    with pytest.raises(AttributeError, match=r"module 'some.module' has no attribute 'Nothing'"):
        attribute("Nothing")


def test_someone_who_knows_better_explains():
    explained = library("fake_cu12", explain=lambda: Absent("an impostor is installed", "Uninstall it."))
    assert Absent("an impostor is installed", "Uninstall it.") == explained.result()


def test_a_variable_is_set_before_the_library_loads(site, monkeypatch, caplog):
    monkeypatch.delenv("UCX_TEST", raising=False)
    package(site, "fake_cu12", top="import os; seen = os.environ.get('UCX_TEST')")
    library("fake_cu12", environment={"UCX_TEST": "1024"}).result()
    assert "1024" == sys.modules["fake_cu12"].seen
    assert [] == caplog.records
    monkeypatch.delenv("UCX_TEST")


def test_a_variable_that_the_user_set_is_left_alone(site, monkeypatch, caplog):
    monkeypatch.setenv("UCX_TEST", "7")
    package(site, "fake_cu12")
    __import__("fake_cu12")
    library("fake_cu12", environment={"UCX_TEST": "1024"}).result()
    assert ("7", []) == (os.environ["UCX_TEST"], caplog.records)


def test_a_library_that_came_first_is_warned_of_once(site, monkeypatch, caplog):
    package(site, "fake_cu12")
    __import__("fake_cu12")
    for _ in range(2):
        monkeypatch.delenv("UCX_TEST", raising=False)
        library("fake_cu12", environment={"UCX_TEST": "1024"}).result()
    expected = (
        "NIXL was imported (as fake_cu12) before tensorway could set UCX_TEST=1024; set it before the process starts"
    )
    assert [expected] == [record.getMessage() for record in caplog.records]
    monkeypatch.delenv("UCX_TEST")


def test_eight_threads_load_it_once(site):
    top = "import time, builtins; builtins.loads = getattr(builtins, 'loads', 0) + 1; time.sleep(0.2)"
    package(site, "fake_cu12", top=top)
    shared, results = library("fake_cu12"), []
    barrier = threading.Barrier(8)

    def load() -> None:
        barrier.wait(10)
        results.append(shared.result())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    import builtins

    assert ({id(results[0])}, 8, 1) == ({id(result) for result in results}, len(results), builtins.loads)
    del builtins.loads


def test_a_library_that_reconfigures_logging_closes_no_handler_of_ours(site, tmp_path):
    top = """
import logging, logging.config
logging.config.dictConfig({"version": 1, "disable_existing_loggers": False,
    "handlers": {"console": {"class": "logging.StreamHandler"}}, "loggers": {"fakelib": {"handlers": ["console"]}}})
logging.raiseExceptions = False
"""
    package(site, "fake_cu12", top=top)
    log = logging.getLogger("application")
    handler = logging.FileHandler(tmp_path / "log", mode="w")
    log.addHandler(handler)
    log.warning("before")
    assert isinstance(library("fake_cu12").result(), Loaded)
    log.warning("after")
    log.removeHandler(handler)
    handler.close()
    assert "before\nafter\n" == (tmp_path / "log").read_text()
    assert logging.raiseExceptions is True
