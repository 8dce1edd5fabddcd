"""Configuration into an offer's options: every key known, every value of its type, or an error that says which is not.

Room `plugins`; may import the ground. msgspec checks the types; it is imported when there are options to check.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.types import Offer

#: msgspec may not learn of a type in two threads at once.
_CONVERTING: Final = threading.Lock()
_Options = TypeVar("_Options")


@attrs.frozen
class _Given:
    """Whose options they are, as an error says it, and where what is possible can be read."""

    asked: str
    see: str

    def invalid(self, true: str, to_do: str) -> OptionsInvalid:
        return OptionsInvalid(self.asked, true, to_do)


def validated(offer: Offer, given: Mapping[str, object] | object) -> object:
    """The offer's options from a mapping (or from an instance of its class, which passes as it is)."""
    asked, see = f"Options were given to {offer.kind} {offer.name!r}.", f"See tensorway plugins show {offer.name}."
    return fitted(offer.options, given, asked, see)


def fitted(options: type[_Options], given: Mapping[str, object] | object, asked: str, see: str) -> _Options:
    """The same for any attrs class, such as that of options within options: an error begins with what was `asked`."""
    of = _Given(asked, see)
    if isinstance(given, options):
        return given
    if not isinstance(given, Mapping):
        raise of.invalid(f"They are a {type(given).__name__}.", f"Give a mapping, or a {options.__name__}.")
    resolved: Any = attrs.resolve_types(options)  # type: ignore[type-var]
    fields = {field.alias: field for field in attrs.fields(resolved) if field.init}
    for key in given:
        if key not in fields:
            raise of.invalid(f"It has no option {key!r}.", _nearest(str(key), fields))
    if absent := [key for key, field in fields.items() if field.default is attrs.NOTHING and key not in given]:
        raise of.invalid(f"The option {absent[0]!r} has no default and was not given.", f"Give {absent[0]!r}.")
    values = {key: _converted(of, key, fields[key], value) for key, value in given.items()}
    try:
        return options(**values)
    except OptionsInvalid:  # of options within these, which say themselves what they are
        raise
    except (ValueError, TypeError) as error:  # the class's own validators
        raise of.invalid(f"{error}.".replace("..", "."), of.see) from error


def _converted(of: _Given, key: str, field: attrs.Attribute[Any], value: object) -> object:
    import msgspec

    if field.type is None:
        return value
    try:
        with _CONVERTING:
            return msgspec.convert(value, field.type)
    except msgspec.ValidationError as error:
        # What no report shows (`repr=False`) is a secret, or may hold one: a number without quotes is one, too.
        shown = repr(value) if field.repr else "not shown"
        text = f"The option {key!r} is {shown}: {_lower(str(error))}."
        raise of.invalid(text, f"Give {key!r} as {_type_name(field.type)}.") from None


def _nearest(key: str, fields: Mapping[str, object]) -> str:
    if not fields:
        return "Give none: it has no options."
    near = difflib.get_close_matches(key, fields, n=1)
    known = f"It knows: {', '.join(sorted(fields))}."
    return f"Did you mean {near[0]!r}? {known}" if near else known


def _type_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
