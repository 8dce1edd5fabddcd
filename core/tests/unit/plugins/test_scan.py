"""Discovery reads metadata, and metadata is hostile until checked."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorway.hookspecs import HOOKS
from tensorway.plugins import scan


def codes(found: scan.Scan) -> list[str]:
    return [complaint.code for complaint in found.complaints]


def test_an_entry_point_becomes_a_declaration_with_everything_that_metadata_knows(site):
    info = site.dist(
        "acme-nixl", {"tensorway.transport": {"acme": "acme_nixl.offers:transport"}}, version="2.5", api="1"
    )
    expected = scan.Declaration(
        kind="transport",
        name="acme",
        value="acme_nixl.offers:transport",
        dist="acme-nixl",
        version="2.5",
        location=str(info),
        api=1,
    )
    assert ((expected,), ()) == (site.scan().declarations, site.scan().complaints)


def test_dists_without_our_groups_are_not_parsed(site, monkeypatch):
    for number in range(5):
        site.dist(f"other{number}", {"console_scripts": {"x": "y:z"}}, api=None)
    distribution = scan._metadata().PathDistribution
    monkeypatch.setattr(distribution, "entry_points", property(lambda self: 1 / 0))
    monkeypatch.setattr(distribution, "metadata", property(lambda self: 1 / 0))
    assert ((), ()) == (site.scan().declarations, site.scan().complaints)


def test_the_order_does_not_depend_on_the_file_system(site, tmp_path):
    for name in ("zeta", "alpha", "mid"):
        site.dist(name, {"tensorway.transport": {name: "m:f"}, "tensorway.platform": {name: "m:f"}})
    distributions = list(scan._metadata().distributions(path=[str(site.path)]))
    forward = scan.scan(lambda: distributions)
    backward = scan.scan(lambda: distributions[::-1])
    assert forward == backward
    assert ["platform"] * 3 + ["transport"] * 3 == [row.kind for row in forward.declarations]
    assert ["alpha", "mid", "zeta"] * 2 == [row.name for row in forward.declarations]


def test_a_dist_that_is_there_twice_counts_once_and_is_reported(site, tmp_path):
    first = site.dist("acme", {"tensorway.transport": {"acme": "new:f"}}, version="2.0")
    other = tmp_path / "lib64"
    second = other / "Acme-1.0.dist-info"
    second.mkdir(parents=True)
    for file in first.iterdir():
        (second / file.name).write_text(
            file.read_text().replace("acme\nVersion: 2.0", "Acme\nVersion: 1.0").replace("new:f", "old:f")
        )
    found = scan.scan(lambda: scan._metadata().distributions(path=[str(site.path), str(other)]))
    assert [("new:f", "2.0")] == [(row.value, row.version) for row in found.declarations]
    assert ["found-twice"] == codes(found)
    assert str(second) in found.complaints[0].reason


def test_a_group_that_this_core_does_not_know_is_a_complaint_not_an_error(site):
    site.dist("future", {"tensorway.teleporter": {"x": "m:f"}})
    found = site.scan()
    assert [("unknown-hook", "future")] == [(row.code, row.dist) for row in found.complaints]
    assert "teleporter" in found.complaints[0].reason


def test_names_that_could_fool_a_terminal_are_refused_and_shown_harmlessly(site):
    site.dist("evil", {"tensorway.transport": {"\x1b[31mred": "m:f", "ok": "m:f", "a" * 65: "m:f"}})
    found = site.scan()
    assert ["ok"] == [row.name for row in found.declarations]
    assert ["entry-point-invalid"] * 2 == codes(found)
    assert all("\x1b" not in row.reason for row in found.complaints)


def test_text_from_elsewhere_is_made_harmless_and_bounded():
    assert "\\x1b[31mred\\x0a\\xe9\\x7f" == scan.printable("\x1b[31mred\n\u00e9\x7f")
    assert 500 == len(scan.printable("x" * 10_000))


def test_a_reference_that_is_not_module_and_function_is_refused(site):
    site.dist("evil", {"tensorway.transport": {"a": "no_colon", "b": "m:f [extra]", "c": "os;rm:f", "d": "m:f.g"}})
    found = site.scan()
    assert ["d"] == [row.name for row in found.declarations]
    assert ["entry-point-invalid"] * 3 == codes(found)


def test_of_ten_thousand_entry_points_of_one_dist_a_bounded_number_is_kept(site):
    site.dist("flood", {"tensorway.transport": {f"n{number}": "m:f" for number in range(10_000)}})
    site.dist("quiet", {"tensorway.transport": {"quiet": "m:f"}})
    found = site.scan()
    assert scan.MAX_PER_DIST + 1 == len(found.declarations)
    assert "quiet" in {row.name for row in found.declarations}
    assert ["too-many"] == codes(found)
    assert "10,000" in found.complaints[0].reason


def test_ten_thousand_bad_entry_points_make_a_bounded_report(site):
    site.dist("flood", {"tensorway.transport": {f"n{number}": "nonsense" for number in range(10_000)}})
    assert len(site.scan().complaints) <= scan.MAX_PER_DIST + 1


def test_a_huge_entry_points_file_is_not_parsed(site):
    info = site.dist("huge", {"tensorway.transport": {"x": "m:f"}})
    with (info / "entry_points.txt").open("a") as file:
        file.write("# " + "x" * (scan.MAX_BYTES + 1))
    found = site.scan()
    assert ((), ["metadata-unreadable"]) == (found.declarations, codes(found))


def test_metadata_that_is_not_utf8_is_a_complaint_and_hides_nobody(site):
    site.dist("fine", {"tensorway.transport": {"fine": "m:f"}})
    info = site.dist("broken", {"tensorway.transport": {"x": "m:f"}})
    (info / "entry_points.txt").write_bytes(b"[tensorway.transport]\nx = \xff\xfe:f\n")
    found = site.scan()
    assert ["fine"] == [row.name for row in found.declarations]
    assert ["metadata-unreadable"] == codes(found)
    assert str(info) in found.complaints[0].remedy


def test_a_dist_without_a_name_is_a_complaint(site):
    info = site.dist("nameless", {"tensorway.transport": {"x": "m:f"}})
    (info / "METADATA").write_text("Version: 1.0\n")
    found = site.scan()
    assert ((), ["metadata-unreadable"]) == (found.declarations, codes(found))


def test_a_finder_that_raises_is_a_complaint_and_what_came_before_it_counts(site):
    site.dist("fine", {"tensorway.transport": {"fine": "m:f"}})

    def distributions():
        yield from scan._metadata().distributions(path=[str(site.path)])
        raise RuntimeError("a foreign finder")

    found = scan.scan(distributions)
    assert ["fine"] == [row.name for row in found.declarations]
    assert "a foreign finder" in found.complaints[0].reason


def test_a_symlink_cycle_on_the_path_is_survived(site):
    (site.path / "loop.dist-info").symlink_to(site.path / "loop.dist-info")
    (site.path / "here").symlink_to(site.path)
    site.dist("fine", {"tensorway.transport": {"fine": "m:f"}})
    assert ["fine"] == [row.name for row in site.scan().declarations]


def test_the_api_is_read_from_metadata_and_an_unclear_one_is_none(site):
    site.dist("one", {"tensorway.transport": {"one": "m:f"}}, api="7")
    site.dist("none", {"tensorway.transport": {"none": "m:f"}}, api=None)
    site.dist("two", {"tensorway.transport": {"two": "m:f"}, "tensorway.api": {"1": "x", "2": "x"}}, api=None)
    site.dist("word", {"tensorway.transport": {"word": "m:f"}}, api="latest")
    assert {"one": 7, "none": None, "two": None, "word": None} == {
        row.name: row.api for row in site.scan().declarations
    }


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=400), prefix=st.sampled_from([b"", b"[tensorway.transport]\n", b"[ tensorway.x ]\n[[["])
)
def test_no_bytes_in_an_entry_points_file_take_the_scan_down(tmp_path, content, prefix):
    folder = tmp_path / "fuzz.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text("Name: fuzz\nVersion: 1\n")
    (folder / "entry_points.txt").write_bytes(prefix + content)
    found = scan.scan(lambda: scan._metadata().distributions(path=[str(tmp_path)]))
    assert all(row.kind in HOOKS and scan._NAME.fullmatch(row.name) for row in found.declarations)
    assert all(text.isprintable() for row in found.complaints for text in (row.reason, row.remedy, row.dist))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_no_bytes_in_a_metadata_file_take_the_scan_down(tmp_path, content):
    folder = tmp_path / "fuzz.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_bytes(content)
    (folder / "entry_points.txt").write_text("[tensorway.transport]\nx = m:f\n")
    found = scan.scan(lambda: scan._metadata().distributions(path=[str(tmp_path)]))
    assert len(found.declarations) + len(found.complaints) == 1


def test_one_lookup_for_a_message_walks_nothing():
    assert scan.installed_version("no-such-dist-anywhere") is None
    assert scan.installed_version("pluggy") is not None
    assert frozenset() == scan.extras("no-such-dist-anywhere")
    assert "nixl" in scan.extras("tensorway")


def test_the_modern_metadata_module_is_used_on_every_python():
    expected = "importlib.metadata" if sys.version_info >= (3, 12) else "importlib_metadata"
    assert expected == scan._metadata().__name__
    assert Path(scan._metadata().__file__).exists()
