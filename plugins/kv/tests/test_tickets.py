"""What travels through a router: opened as it was issued, by whom it is for, once and in time; or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorway.errors import TensorwayError, TicketInvalid, Unauthenticated
from tensorway_kv import tickets
from tensorway_kv.tickets import Limits, Seen, Ticket, issue, tenant_of

SECRET = "known to all engines of the deployment"
NOW = 1_800_000_000.0
TICKET = Ticket(
    engine="prefill-0",
    incarnation="prefill-0.1",
    group="/prod/kv",
    request="cmpl-1",
    epoch=(1 << 52) + 1,
    tokens=40,
    blocks=((4, 9, 2), (7,)),
    tp=2,
    pp=2,
    geometry="abc",
    issued=NOW,
    expires=NOW + 30,
    tenant=tenant_of("salt", SECRET),
    content="c",
)


def through_a_router(mapping):
    """JSON there and back, with other spaces, another order of keys and other escapes."""
    return json.loads(json.dumps(dict(reversed(list(mapping.items()))), indent=3, ensure_ascii=False))


def refused(brought, cause, now=NOW, limits=None, match="."):
    with pytest.raises(TicketInvalid, match=match) as caught:
        tickets.open(brought, SECRET, now, limits or Limits())
    assert cause == caught.value.cause
    assert cause in TicketInvalid.CAUSES
    assert 3 == len(str(caught.value).splitlines())
    return caught.value


def sealed(body, version=1, secret=SECRET):
    """What somebody who knows the secret can make of any body."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {
        "tensorway_kv": version,
        "length": len(raw.decode(errors="replace")),
        "body": raw.decode(errors="replace"),
        "seal": tickets._seal(version, raw, secret),
    }


def fields(**other):
    return json.loads(issue(TICKET, SECRET)["body"]) | other


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)


@given(
    engine=names,
    request=names,
    epoch=st.integers(1, (1 << 63) - 1),
    tokens=st.integers(1, (1 << 31) - 1),
    blocks=st.lists(st.lists(st.integers(0, (1 << 31) - 1), unique=True).map(tuple), min_size=1, max_size=5).map(tuple),
    issued=st.floats(0, 1e10),
    life=st.floats(0.001, 3600),
)
def test_a_ticket_survives_any_router(engine, request, epoch, tokens, blocks, issued, life):
    ticket = Ticket(
        engine=engine,
        incarnation=engine,
        group="",
        request=request,
        epoch=epoch,
        tokens=tokens,
        blocks=blocks,
        issued=issued,
        expires=issued + life,
    )
    assert ticket == tickets.open(through_a_router(issue(ticket, SECRET)), SECRET, issued, Limits(max_life=3601))


def test_what_else_is_sent_along_is_nobodys_business():
    more = {"do_remote_decode": True, "nested": {"x": [1]}} | issue(TICKET, SECRET)
    assert TICKET == tickets.open(more, SECRET, NOW)


# -- forged


@settings(max_examples=200)
@given(data=st.data())
def test_a_body_of_which_one_character_differs_is_forged(data):
    whole = issue(TICKET, SECRET)
    at = data.draw(st.integers(0, whole["length"] - 1))
    other = data.draw(st.characters(codec="utf-8").filter(lambda character: character != whole["body"][at]))
    refused(whole | {"body": whole["body"][:at] + other + whole["body"][at + 1 :]}, "forged")


def test_a_client_cannot_address_blocks_that_it_was_not_given():
    """The attack: everything as it was, and other block ids."""
    whole = issue(TICKET, SECRET)
    body = whole["body"].replace("[4,9,2]", "[4,9,3]")
    assert body != whole["body"]
    refused(whole | {"body": body}, "forged")
    refused(whole | {"seal": hashlib.blake2b(body.encode(), digest_size=32).hexdigest(), "body": body}, "forged")


def test_a_seal_is_of_one_version_one_secret_and_one_purpose():
    whole = issue(TICKET, SECRET)
    refused(sealed(fields(), secret="that of another deployment"), "forged")
    refused(whole | {"seal": ""}, "forged")
    refused(whole | {"seal": whole["seal"].upper()}, "forged")
    refused(whole | {"seal": "\ud800é"}, "forged")
    refused(whole | {"body": "\ud800" + whole["body"][1:]}, "forged")
    plain = hashlib.blake2b(whole["body"].encode(), digest_size=32, key=SECRET.encode()[:64]).hexdigest()
    refused(whole | {"seal": plain}, "forged")
    assert tickets._key(SECRET, b"tensorway ticket") != tickets._key(SECRET, b"tensorway tenant")


def test_the_version_is_under_the_seal(monkeypatch):
    monkeypatch.setattr(tickets, "ACCEPTED", frozenset({2, 1}))
    assert TICKET == tickets.open(issue(TICKET, SECRET, version=2), SECRET, NOW)
    refused(issue(TICKET, SECRET, version=1) | {"tensorway_kv": 2}, "forged")


@pytest.mark.parametrize("use", [lambda: issue(TICKET, ""), lambda: tickets.open(issue(TICKET, SECRET), "", NOW)])
def test_without_a_secret_nothing_is_sealed_or_opened(use):
    with pytest.raises(Unauthenticated, match="anybody could seal one"):
        use()


def test_an_error_says_nothing_of_the_secret_and_survives_pickling():
    error = refused(issue(TICKET, SECRET) | {"seal": "x"}, "forged")
    key = tickets._key(SECRET, b"tensorway ticket")
    assert not [word for word in (SECRET, key.hex(), repr(key), issue(TICKET, SECRET)["seal"]) if word in repr(error)]
    again = pickle.loads(pickle.dumps(error))
    assert ("forged", str(error)) == (again.cause, str(again))
    assert isinstance(again, TensorwayError) and isinstance(again, ValueError)


# -- truncated, foreign, malformed


@pytest.mark.parametrize("name", ["length", "body", "seal"])
def test_a_ticket_that_lost_a_part_is_truncated(name):
    whole = issue(TICKET, SECRET)
    refused({key: value for key, value in whole.items() if key != name}, "truncated", match="missing")
    refused(whole | {name: None}, "truncated")


@given(cut=st.integers(1, 100))
def test_a_body_that_was_cut_short_is_truncated(cut):
    whole = issue(TICKET, SECRET)
    refused(whole | {"body": whole["body"][:-cut]}, "truncated")


@pytest.mark.parametrize(
    "brought",
    [
        {},
        {"remote_block_ids": [1, 2], "remote_engine_id": "x", "do_remote_prefill": True},
        sealed(fields(), version=2),
        sealed(fields(), version=0),
        sealed(fields()) | {"tensorway_kv": True},
        sealed(fields()) | {"tensorway_kv": "1"},
        sealed(fields()) | {"tensorway_kv": 1 << 20_000},
    ],
    ids=range(7),
)
def test_what_another_connector_or_version_made_is_foreign(brought):
    refused(brought, "foreign")


@pytest.mark.parametrize("brought", [None, [], "ticket", b"x", 4, json.dumps(issue(TICKET, SECRET))], ids=range(6))
def test_what_is_no_mapping_is_malformed(brought):
    refused(brought, "malformed")


@pytest.mark.parametrize(
    ("name", "value"), [("body", ["x"]), ("body", b"x"), ("length", 1.5), ("length", True), ("seal", 4)]
)
def test_an_envelope_with_a_wrong_type_is_malformed(name, value):
    refused(issue(TICKET, SECRET) | {name: value}, "malformed")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        {},
        fields(more=1),
        {name: value for name, value in fields().items() if name != "epoch"},
        fields(engine=""),
        fields(engine="x" * 129),
        fields(incarnation=None),
        fields(request=""),
        fields(epoch=0),
        fields(epoch="7"),
        fields(epoch=1.5),
        fields(epoch=1 << 63),
        fields(tokens=0),
        fields(tokens=-1),
        fields(tokens=True),
        fields(blocks=[]),
        fields(blocks=[[]] * 257),
        fields(blocks=[[-1]]),
        fields(blocks=[[1 << 31]]),
        fields(blocks=[["1"]]),
        fields(blocks=[[4, 5, 4]]),
        fields(tp=0),
        fields(pp=65_537),
        fields(issued=-1),
        fields(issued=float("nan")),
        fields(expires=1e300),
        fields(expires=NOW),
        fields(expires=NOW - 1),
        fields(expires=NOW + 3601),
        fields(issued=NOW + 6, expires=NOW + 30),
    ],
    ids=itertools.count(),
)
def test_a_body_that_is_sealed_and_cannot_be_meant_is_malformed(body):
    refused(sealed(body), "malformed")


def test_a_body_is_not_read_before_its_length_is_checked(monkeypatch):
    monkeypatch.setattr(tickets, "_DECODE", lambda body: pytest.fail("it was read"))
    monkeypatch.setattr(tickets, "_seal", lambda *_: pytest.fail("its seal was computed"))
    length = len(issue.__doc__)
    for body in ("x" * (length + 1), "é" * (length + 1)):
        brought = {"tensorway_kv": 1, "length": 1, "body": body, "seal": ""}
        refused(brought, "malformed", limits=Limits(max_length=length), match="none has more than")


def test_nobody_issues_what_nobody_would_open():
    for other in (
        {"tokens": 0},
        {"blocks": ((1, 1),)},
        {"request": "\ud800"},
        {"expires": NOW},
        {"issued": float("nan")},
    ):
        with pytest.raises(TicketInvalid) as caught:
            issue(msgspec.structs.replace(TICKET, **other), SECRET)
        assert "malformed" == caught.value.cause


# -- expired, and for another


def test_a_ticket_ends_with_its_time_and_the_difference_of_clocks():
    whole = issue(TICKET, SECRET)
    assert TICKET == tickets.open(whole, SECRET, NOW + 34.9)
    refused(whole, "expired", now=NOW + 35)
    refused(whole, "expired", now=NOW + 30, limits=Limits(skew=0))
    assert TICKET == tickets.open(whole, SECRET, NOW - 5), "the producer's clock is ahead"
    refused(whole, "malformed", now=NOW - 5.1, match="clocks differ")


@pytest.mark.parametrize("name", ["group", "tenant", "content"])
def test_a_ticket_for_another_is_foreign(name):
    whole = issue(TICKET, SECRET)
    assert TICKET == tickets.open(whole, SECRET, NOW, Limits(**{name: getattr(TICKET, name)}))
    refused(whole, "foreign", limits=Limits(**{name: ""}), match=f"another {name}")


def test_a_tenants_salt_is_recognised_and_not_told():
    assert tenant_of("salt", SECRET) == tenant_of("salt", SECRET) != tenant_of("salt", SECRET + "x")
    assert tenant_of("salt", SECRET) != tenant_of("", SECRET)
    assert "salt" not in json.dumps(issue(TICKET, SECRET))
    assert tenant_of("\ud800", SECRET), "a client wrote it"


# -- replayed


def replayed(seen, ticket, request, now=NOW):
    with pytest.raises(TicketInvalid) as caught:
        seen.use(ticket, request, now)
    return "replayed" == caught.value.cause


def other(**fields):
    return msgspec.structs.replace(TICKET, **fields)


def test_a_ticket_serves_one_request_as_often_as_that_tries():
    seen = Seen()
    seen.use(TICKET, "mine", NOW)
    seen.use(TICKET, "mine", NOW + 1)
    assert replayed(seen, TICKET, "another")
    assert replayed(seen, other(expires=NOW + 60), "another"), "issued again for the same lease"
    for different in (other(epoch=5), other(incarnation="prefill-0.2"), other(request="cmpl-2")):
        seen.use(different, "another", NOW)
    assert 4 == len(seen)


def test_a_ticket_is_forgotten_only_when_it_would_not_open_any_more():
    seen, whole = Seen(), issue(TICKET, SECRET)
    seen.use(TICKET, "mine", NOW)
    last = NOW + 34.999
    assert TICKET == tickets.open(whole, SECRET, last)
    assert replayed(seen, TICKET, "another", last)
    assert replayed(seen, TICKET, "another", NOW + 35)
    refused(whole, "expired", now=NOW + 35)
    seen.use(other(epoch=5, expires=NOW + 90), "x", NOW + 36)
    assert 1 == len(seen), "time bounds it"


def test_too_many_tickets_are_refused_and_not_forgotten():
    seen = Seen(capacity=3)
    for number in range(3):
        seen.use(other(epoch=number + 1), "mine", NOW)
    assert replayed(seen, other(epoch=9), "mine")
    seen.use(other(epoch=2), "mine", NOW)
    assert replayed(seen, other(epoch=1), "another")
    assert 3 == len(seen)
