"""`tensorway why KIND NAME`: who would be chosen, and a reason for every one that would not.

Room `cli`.
"""

from __future__ import annotations

from tensorway.cli import exits
from tensorway.cli.backends import show_decision
from tensorway.cli.output import Output
from tensorway.plugins import host, report
from tensorway.plugins.select import AUTO


def run(out: Output, kind: str, name: str, device: str, needs: list[str]) -> int:
    """Decide with everything probed, print the decision, return the exit code."""
    if name.partition("@")[0] != AUTO:
        host().named(name, kind)  # a name that nobody offers is an error before anything is probed
    out.progress(f"Loading and probing every {kind} that is installed ...")
    decision = host().decide(kind, name, device=device, needs=needs, probe_all=True)
    row = report.decision_row(decision)
    refusal = None if decision.winner else host().refusal(decision)
    code = exits.code_for(refusal) if refusal else exits.OK
    out.json("tensorway.why/1", {**row, "exit_code": code})
    show_decision(out, row)
    if refusal is not None:
        out.line()
        out.line(str(refusal))
    return code
