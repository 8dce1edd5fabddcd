"""A badge says what its report says, and never more."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from tensorway.cli import badge

SVG = "{http://www.w3.org/2000/svg}"


def report(passed=58, failed=0, skipped=0, **fields):
    return {
        "kind": "transport",
        "name": "acme",
        "dist": "tensorway-acme",
        "version": "0.1.0",
        "tensorway": "0.2.0",
        "date": "2026-11-22T10:00:00+00:00",
        "capabilities": ["read", "write"],
        "left_out": [],
        "totals": {"passed": passed, "failed": failed, "skipped": skipped, "seconds": 1.0},
        "exit_code": 1 if failed or not passed else 0,
    } | fields


def endpoint(**fields):
    return json.loads(badge.badge(report(**fields), ".json"))


def texts(svg):
    return [node.text for node in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize(
    ("fields", "message", "color"),
    [
        ({}, "58 passed, kit 0.2.0", badge._GOOD),
        ({"skipped": 3}, "58 passed, 3 skipped, kit 0.2.0", badge._GOOD),
        ({"failed": 1}, "1 failed, 58 passed, kit 0.2.0", badge._BAD),
        ({"passed": 0}, "nothing passed, kit 0.2.0", badge._BAD),
        ({"passed": 0, "skipped": 4}, "4 skipped, kit 0.2.0", badge._BAD),
        ({"passed": 6, "left_out": [{}]}, "offer only, 6 passed, kit 0.2.0", badge._PART),
        ({"failed": 1, "left_out": [{}]}, "offer only, 1 failed, 58 passed, kit 0.2.0", badge._BAD),
    ],
)
def test_it_says_what_came_of_the_check(fields, message, color):
    made = endpoint(**fields)
    assert (message, color) == (made["message"], made["color"])
    svg = badge.badge(report(**fields), ".svg")
    assert ["tensorway transport", message] == texts(svg)
    assert f'fill="{color}"' in svg


def test_an_endpoint_has_the_fields_that_shields_takes_and_no_other():
    assert {"schemaVersion", "label", "message", "color", "isError"} == set(endpoint())
    assert 1 == endpoint()["schemaVersion"]
    assert [False, True] == [endpoint()["isError"], endpoint(failed=1)["isError"]]


def test_a_picture_says_whose_it_is_and_what_was_asked_of_it():
    title = ET.fromstring(badge.badge(report(), ".svg")).find(f"{SVG}title").text
    assert "transport acme from tensorway-acme 0.1.0, 2026-11-22; capabilities: read, write" == title
    assert "none beyond the minimum" in badge.badge(report(capabilities=[]), ".svg")


def test_what_a_dist_calls_itself_cannot_leave_its_place_in_the_picture():
    svg = badge.badge(report(dist='"/><script>alert(1)</script>', capabilities=["<&"]), ".svg")
    assert [] == list(ET.fromstring(svg).iter(f"{SVG}script"))
    assert '"/><script>alert(1)</script>' in ET.fromstring(svg).find(f"{SVG}title").text


def test_texts_fit_into_their_halves():
    root = ET.fromstring(badge.badge(report(failed=123, skipped=456), ".svg"))
    label, message = root.iter(f"{SVG}text")
    left = int(root.find(f"{SVG}path").get("d").split()[0].removeprefix("M"))
    assert int(label.get("x")) + int(label.get("textLength")) <= left
    assert left < int(message.get("x"))
    assert int(message.get("x")) + int(message.get("textLength")) <= int(root.get("width"))
