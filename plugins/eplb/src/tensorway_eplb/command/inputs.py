"""What a person hands over, checked before anything is computed: files of loads, the start, names of policies.

May import the core's front door, numpy and this dist. A file is hostile until checked: its size, its shape and every
number in it; a `.npy` file that would unpickle an object is refused.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any, Final, NoReturn

import attrs
import numpy as np
from numpy.typing import NDArray

import tensorway
from tensorway.errors import OptionsInvalid, PlacementInvalid
from tensorway_eplb.placement import Loads, Placement
from tensorway_eplb.policy import Budget, PlacementPolicy, Topology

#: A file of more numbers than this is refused, and one of more bytes is not even read.
_MAX_NUMBERS: Final = 1 << 24
_MAX_BYTES: Final = {".json": 64 << 20, ".csv": 64 << 20, ".npy": (_MAX_NUMBERS << 3) + 4096}
_TO_DO: Final = "Give loads as JSON, CSV or .npy: one row for each layer, one number for each expert."


@attrs.frozen
class Question:
    """What a policy is asked, besides the loads."""

    start: Placement
    topology: Topology
    budget: Budget


def question(given: argparse.Namespace, loads: NDArray[np.float64]) -> Question:
    """The start, the ranks and the budget that were given on the command line, for loads [..., layers, experts]."""
    layers, experts = loads.shape[-2:]
    asked = f"Loads of {layers} layers and {experts} experts are to be balanced."
    if given.placement is not None and (given.ranks or given.slots):
        raise PlacementInvalid(asked, "Both --placement and --ranks or --slots were given.", "Give one of the two.")
    if given.placement is not None:
        start = Placement.load(given.placement)
    elif given.ranks and given.slots:
        if given.ranks * given.slots * layers > _MAX_NUMBERS:
            true = f"{given.ranks} ranks of {given.slots} slots are too many to plan for."
            raise PlacementInvalid(asked, true, "Give the ranks of the group, and the slots of each.")
        start = Placement.linear(layers, experts, given.ranks, given.slots)
    else:
        to_do = "Give --placement FILE, or --ranks N and --slots N for experts in order."
        raise PlacementInvalid(asked, "It was not said where the experts are.", to_do)
    if (start.layers, start.num_logical) != (layers, experts):
        true = f"The placement has {start.layers} layers and {start.num_logical} experts."
        raise PlacementInvalid(asked, true, "Give loads and a placement of one model.")
    topology = Topology.flat(start.ranks, given.per_node)
    if given.speeds is not None:
        topology = Topology(topology.nodes, given.speeds)
    return Question(start, topology, Budget(given.budget))


def policy(text: str) -> PlacementPolicy:
    """The policy that `name[:option=value]...` asks for, constructed by the host, whoever brings it."""
    name, *pairs = text.strip().split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise OptionsInvalid(
                f"The policy {text!r} was asked for.",
                f"{pair!r} is no option with a value.",
                f"Write {name}:option=value; tensorway plugins show {name} lists its options.",
            )
        options[key.strip()] = _value(value.strip())
    made: PlacementPolicy = tensorway.create("placement_policy", name, options)
    return made


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def snapshot(path: Path) -> Loads:
    """One set of loads: [layers, experts]."""
    loads = series([path])
    if len(loads) != 1:
        _refuse(path, f"It holds {len(loads)} sets of loads, and one is planned for.", "Use tensorway eplb replay.")
    first: Loads = loads[0]
    return first


def series(paths: list[Path]) -> Loads:
    """Several sets of loads in order: [sets, layers, experts]. A file holds one set or several."""
    found = [_read(path) for path in paths]
    for path, loads in zip(paths, found, strict=True):
        if loads.shape[1:] != found[0].shape[1:]:
            true = f"It has {loads.shape[1:]} layers and experts, and the first file {found[0].shape[1:]}."
            _refuse(path, true, "Give loads of one model.")
    return np.concatenate(found)


def _refuse(path: Path, true: str, to_do: str = _TO_DO) -> NoReturn:
    raise PlacementInvalid(f"The loads {path} were to be read.", true, to_do)


def _read(path: Path) -> Loads:
    readers = {".json": _json, ".csv": _csv, ".npy": _npy}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        _refuse(path, f"Its name ends with {path.suffix!r}; known are {', '.join(readers)}.")
    most = _MAX_BYTES[path.suffix.lower()]
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        _refuse(path, f"The system does not read it: {error.strerror}.")
    if len(data) > most:
        _refuse(path, f"It has more than {most:,} bytes.")
    try:
        given = reader(data)
    except PlacementInvalid:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError, EOFError, SyntaxError) as error:
        _refuse(path, f"It cannot be read as {path.suffix[1:]}: {str(error)[:200] or type(error).__name__}.")
    return _checked(path, given)


def _checked(path: Path, given: NDArray[Any]) -> Loads:
    if given.dtype.kind not in "iuf":
        _refuse(path, f"It holds values of type {given.dtype}, not numbers.")
    loads: Loads = given.astype(np.float64)
    if loads.ndim == 2:
        loads = loads[None]
    if loads.ndim != 3 or 0 in loads.shape or loads.size > _MAX_NUMBERS:
        _refuse(path, f"Its shape is {given.shape}.")
    if not np.isfinite(loads).all():
        _refuse(path, "A load is infinite or not a number.")
    if (loads < 0).any():
        at = [int(part) for part in np.argwhere(loads < 0)[0]]
        _refuse(path, f"The load of expert {at[2]} in layer {at[1]} is negative.")
    return loads


def _json(data: bytes) -> NDArray[Any]:
    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is no load")

    given = json.loads(data, parse_constant=refuse)
    if isinstance(given, dict):
        given = given["loads"]
    if _has_other_than_numbers(given):
        raise ValueError("something in it is not a number, or its rows have different lengths")
    return np.array(given, dtype=np.float64)


def _has_other_than_numbers(given: Any) -> bool:
    """Also for rows of different lengths, of which older versions of numpy make an array of lists."""
    if not isinstance(given, list) or not given:
        return True
    if all(type(value) in (int, float) for value in given):
        return not all(math.isfinite(value) for value in given)
    lengths = {len(value) if isinstance(value, list) else -1 for value in given}
    return len(lengths) != 1 or any(_has_other_than_numbers(value) for value in given)


def _csv(data: bytes) -> NDArray[Any]:
    lines = [line for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    rows = [[float(cell) for cell in line.split(",")] for line in lines]
    if len({len(row) for row in rows}) != 1:
        raise ValueError("it is empty, or its lines have different lengths")
    return np.array(rows)


def _npy(data: bytes) -> NDArray[Any]:
    """The array, if the file holds it whole; what its head claims is compared with what is there before any is made."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"its format is {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, in_columns, kind = read(file)
    if kind.hasobject or kind.kind not in "iuf":
        raise ValueError(f"it holds {kind}, not numbers")
    if len(shape) not in (2, 3) or min(shape) < 1 or math.prod(shape) * kind.itemsize != len(data) - file.tell():
        raise ValueError(f"its head says {shape} numbers, and {len(data) - file.tell():,} bytes are there")
    flat = np.frombuffer(data, dtype=kind, offset=file.tell())
    return flat.reshape(shape, order="F" if in_columns else "C")
