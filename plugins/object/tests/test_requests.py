from __future__ import annotations

import asyncio
import random

import pytest

OPTIONS = {"attempts": 3, "pause": 0.001}


@pytest.fixture
def made(library):
    """Requests, and how often one was made again."""
    from tensorway_object.options import ObjectOptions
    from tensorway_object.requests import Requests

    def make(**options):
        again = []
        return Requests(ObjectOptions(**{**OPTIONS, **options}), lambda: again.append(1)), again

    return make


def ask(requests, answers):
    """What becomes of requests with these answers, one after the other; and how many were made."""
    from tensorway_object.requests import Trouble

    given = iter(answers)
    asked = 0

    async def request():
        nonlocal asked
        asked += 1
        answer = next(given)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def all_of_it():
        try:
            return await requests.make(request)
        except Trouble as trouble:
            return trouble.what

    return asyncio.run(all_of_it()), asked


def failure(text="status code: 500 Internal Server Error"):
    from obstore.exceptions import GenericError

    return GenericError(f"Generic S3 error: Server returned non-2xx {text}\n\nDebug source: 503 NoSuchBucket")


def test_it_is_made_again_until_it_succeeds(made):
    requests, again = made()

    assert (b"block", 3) == ask(requests, [failure(), failure("status code: 503"), b"block"])
    assert 2 == len(again)


def test_in_the_end_it_has_failed(made):
    assert ("failed", 3) == ask(made()[0], [failure()] * 9)
    assert ("busy", 3) == ask(made()[0], [failure("status code: 429 Too Many Requests")] * 9)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("status code: 400 Bad Request", "refused"),
        ("status code: 501 Not Implemented", "refused"),
        ("status code: 404 Not Found: <Code>NoSuchBucket</Code>", "gone"),
        ("status code: 507 Insufficient Storage", "full"),
        ("No space left on device (os error 28)", "full"),
    ],
)
def test_what_cannot_change_is_asked_once(made, text, what):
    assert (what, 1) == ask(made()[0], [failure(text)] * 9)


@pytest.mark.parametrize(
    "text", ["status code: 408", "status code: 409 Conflict", "connection reset", "status code: 502"]
)
def test_what_may_change_is_asked_again(made, text):
    assert ("failed", 3) == ask(made()[0], [failure(text)] * 9)


def test_classes_of_errors_say_what_is_true(made):
    from obstore import exceptions as of

    for error, what in [
        (FileNotFoundError("no such key"), "missing"),
        (FileNotFoundError("<Code>NoSuchBucket</Code>"), "gone"),
        (of.PermissionDeniedError("no"), "denied"),
        (of.UnauthenticatedError("who"), "denied"),
        (PermissionError(13, "no"), "denied"),
        (of.AlreadyExistsError("there"), "there"),
        (of.PreconditionError("there"), "there"),
        (of.NotSupportedError("no"), "refused"),
    ]:
        assert (what, 1) == ask(made()[0], [error] * 9), error


def test_what_is_no_trouble_of_a_store_is_raised(made):
    with pytest.raises(ZeroDivisionError):
        ask(made()[0], [ZeroDivisionError()])


def test_retries_are_a_part_of_what_succeeds(made, monkeypatch):
    async def sleep(_seconds):
        """At once."""

    monkeypatch.setattr(asyncio, "sleep", sleep)
    requests, again = made(attempts=100, retry_ratio=0.25)
    while ask(requests, [failure()] * 200)[1] > 1:
        pass
    spent = len(again)
    assert 20 == spent, "what may be made again before anything has succeeded"
    for _ in range(8):
        assert (b"", 1) == ask(requests, [b""])

    assert ("failed", 3) == ask(requests, [failure()] * 9), "eight successes at a quarter each"


def test_pauses_are_at_random_and_end(made, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    ask(made(attempts=12, pause=0.1)[0], [failure()] * 20)

    assert [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0, 5.0] == pytest.approx(waits)
