"""`tensorway environment`: what would travel from here, what is held back and why, and what a host policy gives here.

Room `cli`; may import every room. It changes nothing, and shows no value but those of a policy's variables.
"""

from __future__ import annotations

from typing import Any

import attrs

from tensorway import settings
from tensorway.cli import exits
from tensorway.cli.output import Output
from tensorway.plugins.scan import printable
from tensorway.rendezvous import environment as environments
from tensorway.rendezvous import fabrics, hosts
from tensorway.rendezvous.environment import Report


def run(out: Output, policy: str) -> int:
    """Show it; a policy that gives no address here raises `AddressInvalid`."""
    own = settings.environment()
    report, leaked = environments.report(own), environments.leaked(own)
    address = _address(policy) if policy else None
    fields = {**report.plain(), "policy": settings.get(environments.POLICY) or "on", "leaked": leaked}
    out.json("tensorway.environment/1", {**fields, "address": address})
    if fields["policy"].strip().lower() == "off":
        out.text(f"{environments.POLICY}=off: all that is known travels but secrets, and nothing is dropped.")
    _show(out, report, leaked)
    if address:
        _show_address(out, address)
    return exits.OK


def _address(policy: str) -> dict[str, Any]:
    choice = hosts.choose(policy)
    given = fabrics.variables(choice)
    wins = fabrics.conflicts(given)
    rows = [{"name": name, "value": given[name], "set": wins.get(name, "")} for name in sorted(given)]
    return {"policy": policy, **attrs.asdict(choice), "variables": rows}


def _show(out: Output, report: Report, leaked: list[str]) -> None:
    out.line(out.paint("travels", "strong"))
    out.text(", ".join(report.names("travels")) or "nothing", indent=2)
    out.line(out.paint("is held back", "strong"))
    held = [each for each in report.verdicts if each.fate == "held"]
    for why in dict.fromkeys(each.why for each in held):
        out.text(f"{why}: {', '.join(each.name for each in held if each.why == why)}", indent=2, hang=2)
    out.text("" if held else "nothing", indent=2)
    out.line(out.paint("is not known here, and not ours to copy", "strong"))
    out.text(f"{len(report.names('unknown'))} variables; --json names them", indent=2)
    if leaked:
        out.line(out.paint("leaked here from a launcher, and a worker drops it", "bad"))
        out.text(", ".join(leaked), indent=2)


def _show_address(out: Output, address: dict[str, Any]) -> None:
    out.line(out.paint("address", "strong"))
    where = f"{address['address']} of {address['interface'] or 'no interface'}, by {address['source']}"
    out.text(f"{where}: binds {address['bind']}, and tells others {address['advertise']}", indent=2, hang=2)
    for row in address["variables"]:
        wins = f" (not so: {printable(row['set'])} is set, and wins)" if row["set"] else ""
        out.text(f"{row['name']}={row['value']}{wins}", indent=2, hang=4)
