"""Tables of what is going on, made of two looks: which values each shows, as rates or as they are, and what hurts.

Of the package `top` the command imports this; it may import `values` and the core. Whatever hurts comes first: what is
wrong now, then what went wrong before, then what is busiest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import attrs

from tensorway_tools.top.looking import Look

#: `now`: as it is; `total`: since the process began, and beside it by the second; `rate`: by the second;
#: `least`: the smallest; `mean`: what the first metric grew by over what the second did.
Mode = Literal["now", "total", "rate", "least", "mean"]
Labels = Mapping[str, str]
#: A value, and how much more it is than at the look before.
Cell = tuple[float, float | None]


@attrs.frozen
class Column:
    """One value of each row."""

    key: str
    metrics: tuple[str, ...]
    mode: Mode
    #: Which of its values count.
    where: Callable[[Labels], bool] = lambda labels: True
    #: Whether more than nothing is wrong.
    hurts: bool = False
    form: Literal["count", "bytes", "seconds"] = "count"

    @property
    def field(self) -> str:
        """What it is called where it has no head that says what it is."""
        return f"{self.key}_per_second" if self.mode == "rate" else self.key


@attrs.frozen
class Table:
    """Rows of one kind: there is one for each set of these labels."""

    name: str
    title: str
    labels: tuple[str, ...]
    columns: tuple[Column, ...]


@attrs.frozen
class Row:
    """One row: whose it is, its labels, its values by the columns' keys; None where nothing is known yet."""

    source: str
    pid: int
    labels: tuple[str, ...]
    values: dict[str, float | None]
    #: Keys of what is wrong.
    hurts: tuple[str, ...]


def _is(name: str, *values: str) -> Callable[[Labels], bool]:
    return lambda labels: labels.get(name) in values


def _failed(labels: Labels) -> bool:
    return labels.get("cause") not in ("none", "cancelled")


TABLES: Final = (
    Table("endpoints", "ENDPOINTS", ("endpoint", "transport"), (
        Column("read_bytes", ("transport_bytes_total",), "rate", _is("operation", "read"), form="bytes"),
        Column("write_bytes", ("transport_bytes_total",), "rate", _is("operation", "write"), form="bytes"),
        Column("transfers", ("transport_transfers_total",), "rate", _is("cause", "none")),
        Column("pending", ("transport_pending",), "now"),
        Column("quarantined", ("transport_quarantined",), "now", hurts=True),
        Column("failed", ("transport_transfers_total",), "total", _failed, hurts=True),
        Column("peers", ("transport_peers",), "now", _is("state", "connected")),
        Column("lost", ("transport_peers",), "now", _is("state", "lost"), hurts=True),
    )),
    Table("peers", "PEERS", ("endpoint", "peer"), (
        Column("bytes", ("transport_bytes_total",), "rate", form="bytes"),
        Column("transfers", ("transport_transfers_total",), "rate", _is("cause", "none")),
        Column("blocks", ("transport_pieces_total",), "rate"),
        Column("each", ("transport_seconds_total", "transport_transfers_total"), "mean", form="seconds"),
        Column("pending", ("transport_pending",), "now"),
        Column("quarantined", ("transport_quarantined",), "now", hurts=True),
        Column("failed", ("transport_transfers_total",), "total", _failed, hurts=True),
    )),
    Table("leases", "LEASES", ("store", "engine"), (
        Column("held", ("rendezvous_held_leases", "rendezvous_leases", "kv_leases"), "now"),
        Column("left", ("rendezvous_lease_seconds",), "least", form="seconds"),
        Column("ended", ("kv_leases_ended_total",), "total", _is("cause", "acknowledged")),
        Column("lost", ("rendezvous_lost_leases_total", "kv_leases_ended_total", "offload_leases_expired_total"),
               "total", lambda labels: labels.get("cause", "") in ("", "expired", "forced"), hurts=True),
    )),
    Table("handovers", "HAND-OVERS", ("engine", "rank", "direction", "peer"), (
        Column("bytes", ("kv_bytes_total",), "rate", form="bytes"),
        Column("requests", ("kv_requests_total", "kv_transfers_total"), "rate", _is("cause", "none")),
        Column("waiting", ("kv_requests_waiting",), "now"),
        Column("failed", ("kv_requests_total", "kv_transfers_total"), "total", _failed, hurts=True),
        Column("refused", ("kv_blocks_refused_total",), "total", hurts=True),
    )),
    Table("tiers", "TIERS", ("engine", "medium"), (
        Column("blocks", ("offload_blocks",), "now"),
        Column("room", ("offload_capacity_blocks",), "now"),
        Column("stored", ("offload_stored_total",), "rate"),
        Column("loaded", ("offload_loaded_total",), "rate"),
        Column("bytes", ("offload_bytes_total",), "rate", form="bytes"),
        Column("waiting", ("offload_queue_blocks",), "now"),
        Column("dropped", ("offload_dropped_total",), "total", hurts=True),
        Column("failed", ("offload_failures_total",), "total", hurts=True),
        Column("breaker", ("offload_breaker",), "now", hurts=True),
    )),
    Table("rebalances", "REBALANCES", ("group", "member"), (
        Column("bytes", ("eplb_fetched_bytes_total",), "rate", form="bytes"),
        Column("rebalances", ("eplb_rebalances_total",), "total"),
        Column("committed", ("eplb_layers_committed_total",), "total"),
        Column("aborted", ("eplb_layers_aborted_total",), "total", hurts=True),
        Column("mismatched", ("eplb_rows_total",), "total", _is("what", "mismatched"), hurts=True),
        Column("members", ("eplb_members",), "now", _is("state", "there")),
        Column("lost", ("eplb_members",), "now", _is("state", "lost"), hurts=True),
        Column("quarantined", ("eplb_quarantined_rows",), "now", hurts=True),
    )),
)  # fmt: skip


def rows(table: Table, before: Mapping[str, Look], now: Sequence[Look]) -> list[Row]:
    """The table of these looks; `before` has earlier ones, by source."""
    made = []
    for seen in now:
        earlier = before.get(seen.source)
        made += _rows(table, earlier if earlier is not None and earlier.state == "answers" else None, seen)
    return sorted(made, key=_order)


def _rows(table: Table, earlier: Look | None, seen: Look) -> list[Row]:
    """Those of one look."""
    cells: dict[tuple[str, ...], dict[tuple[str, str], list[Cell]]] = {}
    wanted = {metric for column in table.columns for metric in column.metrics}
    for (metric, pairs), value in seen.values.items():
        if metric not in wanted:
            continue
        labels = dict(pairs)
        row = cells.setdefault(tuple(labels.get(name, "") for name in table.labels), {})
        for column in table.columns:
            if metric in column.metrics and column.where(labels):
                cell = value, _since(earlier, (metric, pairs), value)
                row.setdefault((column.key, metric), []).append(cell)
    seconds = seen.at - earlier.at if earlier is not None else 0.0
    return [_row(table, seen, labels, row, seconds) for labels, row in cells.items()]


def _since(earlier: Look | None, key: tuple[str, tuple[tuple[str, str], ...]], value: float) -> float | None:
    """How much more it is now; all of it for what began since, None if it cannot be known."""
    if earlier is None:
        return None
    before = earlier.values.get(key, 0.0)
    return value - before if value >= before else None


def _row(
    table: Table,
    seen: Look,
    labels: tuple[str, ...],
    row: Mapping[tuple[str, str], Sequence[Cell]],
    seconds: float,
) -> Row:
    values: dict[str, float | None] = {}
    for column in table.columns:
        found = [cell for metric in column.metrics for cell in row.get((column.key, metric), ())]
        if column.mode == "least":
            values[column.field] = min((value for value, _ in found), default=None)
        elif column.mode == "mean":
            grown, by = (_grown(row.get((column.key, metric), ())) for metric in column.metrics)
            # Something is counted by ones: of a part of one there is no mean, and by next to nothing it is infinite.
            values[column.field] = grown / by if grown is not None and by is not None and by >= 1 else None
        else:
            grown = _grown(found)
            rate = round(grown / seconds, 6) if grown is not None and seconds > 0 else None
            values[column.field] = rate if column.mode == "rate" else sum(value for value, _ in found)
            if column.mode == "total":
                values[f"{column.key}_per_second"] = rate
    hurts = tuple(column.key for column in table.columns if column.hurts and values[column.field])
    return Row(seen.source, seen.pid, labels, values, hurts)


def _grown(cells: Sequence[Cell]) -> float | None:
    """How much all of them grew together; None if it is not known of one."""
    grown = [more for _, more in cells if more is not None]
    return sum(grown) if len(grown) == len(cells) else None


def _order(row: Row) -> tuple[float, ...]:
    """What is wrong now, what went wrong, what is busy."""
    getting_worse = sum(row.values.get(f"{key}_per_second", row.values[key]) or 0.0 for key in row.hurts)
    total = sum(row.values[key] or 0.0 for key in row.hurts)
    busy = sum(row.values.get(f"{key}_per_second") or 0.0 for key in ("read_bytes", "write_bytes", "bytes"))
    return -getting_worse, -total, -busy, row.pid
