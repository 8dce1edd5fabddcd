"""Configuration into an offer's options: every key known, every value of its type, or an error that says which is not.

Room `plugins`; may import the ground. msgspec checks the types; it is imported when there are options to check.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Mapping
from typing import Any, Final

import attrs

from tensorway.errors import OptionsInvalid
from tensorway.types import Offer

#: msgspec may not learn of a type in two threads at once.
_CONVERTING: Final = threading.Lock()


def validated(offer: Offer, given: Mapping[str, object] | object) -> object:
    """The offer's options from a mapping (or from an instance of its class, which passes as it is)."""
    if isinstance(given, offer.options):
        return given
    if not isinstance(given, Mapping):
        raise _invalid(offer, f"They are a {type(given).__name__}.", f"Give a mapping, or a {offer.options.__name__}.")
    fields = {field.alias: field for field in attrs.fields(attrs.resolve_types(offer.options)) if field.init}
    for key in given:
        if key not in fields:
            raise _invalid(offer, f"It has no option {key!r}.", _nearest(str(key), fields))
    if absent := [key for key, field in fields.items() if field.default is attrs.NOTHING and key not in given]:
        raise _invalid(offer, f"The option {absent[0]!r} has no default and was not given.", f"Give {absent[0]!r}.")
    values = {key: _converted(offer, key, fields[key], value) for key, value in given.items()}
    try:
        return offer.options(**values)
    except (ValueError, TypeError) as error:  # the class's own validators
        raise _invalid(offer, f"{error}.".replace("..", "."), f"See tensorway plugins show {offer.name}.") from error


def _converted(offer: Offer, key: str, field: attrs.Attribute[Any], value: object) -> object:
    import msgspec

    if field.type is None:
        return value
    try:
        with _CONVERTING:
            return msgspec.convert(value, field.type)
    except msgspec.ValidationError as error:
        text = f"The option {key!r} is {value!r}: {_lower(str(error))}."
        raise _invalid(offer, text, f"Give {key!r} as {_type_name(field.type)}.") from None


def _nearest(key: str, fields: Mapping[str, object]) -> str:
    if not fields:
        return "Give none: it has no options."
    near = difflib.get_close_matches(key, fields, n=1)
    known = f"It knows: {', '.join(sorted(fields))}."
    return f"Did you mean {near[0]!r}? {known}" if near else known


def _invalid(offer: Offer, true: str, to_do: str) -> OptionsInvalid:
    return OptionsInvalid(f"Options were given to {offer.kind} {offer.name!r}.", true, to_do)


def _type_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
