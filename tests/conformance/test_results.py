"""The table of compatibility says what the reports say, the reports are whole, and no backend of ours is missing."""

from __future__ import annotations

import importlib.util
import json
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
import tomllib

from tensorway.cli.check import _SUITES
from tensorway.types import KINDS

_spec = importlib.util.spec_from_file_location("results", Path(__file__).with_name("results.py"))
results = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(results)
ROOT = Path(__file__).parents[2]
REPORTS = sorted(results.RESULTS.glob("*.json"))
SCHEMAS = json.loads((resources.files("tensorway.cli") / "schemas.json").read_text("utf-8"))["$defs"]


def declared():
    """Every backend of ours that a suite exists for, from the sources."""
    found = set()
    for file in (ROOT / "core" / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")):
        groups = tomllib.loads(file.read_text("utf-8"))["project"].get("entry-points", {})
        kinds = {group.removeprefix("tensorway."): names for group, names in groups.items()}
        found |= {(kind, name) for kind, names in kinds.items() if kind in _SUITES for name in names}
    return found


def test_every_backend_with_a_suite_has_a_report_or_a_reason():
    there = {(one["kind"], one["name"]) for one in (json.loads(path.read_text("utf-8")) for path in REPORTS)}
    assert declared() == there | set(results.LEFT_OUT)
    assert set() == there & set(results.LEFT_OUT)


def test_the_page_is_made_of_the_reports():
    page = results.PAGE.read_text("utf-8")
    assert results.filled(page) == page, "python tests/conformance/results.py table"
    assert len(REPORTS) == page.count("](conformance/")


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_report_is_what_a_check_wrote(path):
    report = json.loads(path.read_text("utf-8"))
    jsonschema.validate(report, SCHEMAS[report["schema"]] | {"$defs": SCHEMAS}, cls=jsonschema.Draft202012Validator)
    assert f"{report['kind']}-{report['name']}.json" == path.name
    assert ["OfferSuite", *_SUITES[report["kind"]]] == report["suites"]
    outcomes = [test["outcome"] for test in report["tests"]]
    assert {name: outcomes.count(name) for name in ("passed", "failed", "skipped")} == {
        name: count for name, count in report["totals"].items() if name != "seconds"
    }
    assert (0, 0, []) == (report["exit_code"], report["totals"]["failed"], report["left_out"])


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_report_is_of_this_series(path):
    """One that is older says nothing of what is here: `nox -s conformance` makes them anew."""
    series = tomllib.loads((ROOT / "core" / "pyproject.toml").read_text("utf-8"))["project"]["version"].split(".")[:2]
    report = json.loads(path.read_text("utf-8"))
    assert (series, series) == (report["tensorway"].split(".")[:2], report["version"].split(".")[:2])


def test_a_table_of_other_reports_is_another_table(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    before = results.table()
    report = json.loads(REPORTS[0].read_text("utf-8"))
    report["totals"]["failed"] = 7
    (tmp_path / REPORTS[0].name).write_text(json.dumps(report), "utf-8")
    assert "7 failed" not in before
    assert f"[7 failed, {report['totals']['passed']} passed" in results.table()


def test_kinds_with_a_suite_are_kinds():
    assert set(_SUITES) < set(KINDS)
