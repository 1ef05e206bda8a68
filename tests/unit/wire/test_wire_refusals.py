"""Errors across the wire: the sentence, the hint and the exit code arrive, and nothing else does."""

from __future__ import annotations

import grpc
import pytest

from fedcore import errors
from fedcore.wire.refusals import MOST, error_of, status_of


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.BadInput("job: found none", remedy="look at `jobs`"), "INVALID_ARGUMENT"),
        (errors.UnknownName("job", "hart", ["heart"]), "INVALID_ARGUMENT"),
        (errors.PlanRefused("plan: found 20 bits", remedy="bits = 16"), "FAILED_PRECONDITION"),
        (errors.RoundAbandoned("keys", 2, 3), "ABORTED"),
        (
            errors.MalformedMessage("frame", found="x", expected="y", fault="va"),
            "INVALID_ARGUMENT",
        ),
        (
            errors.VersionRefused("wire version", found=2, expected=1, fault="va", remedy="same"),
            "INVALID_ARGUMENT",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_arrives_as_it_was_told(error, code):
    name, details = status_of(error)
    assert name == code and hasattr(grpc.StatusCode, name)
    back = error_of(details)
    assert (str(back), back.remedy, back.exit_code) == (str(error), error.remedy, error.exit_code)


@pytest.mark.parametrize(
    "error",
    [ValueError("PATIENT-7419"), KeyError("PATIENT-7419"), errors.TaskFailed("PATIENT-7419")],
    ids=repr,
)
def test_any_other_exception_keeps_its_text_at_home(error):
    name, details = status_of(error)
    assert name == "INTERNAL" and "PATIENT" not in details
    assert str(error_of(details)) == "the coordinator failed"


@pytest.mark.parametrize(
    "details",
    ["", "Socket closed", "[]", "7", "{}", '{"error":1,"hint":"","exit":2}', "[" * 100_000,
     '{"error":"a","hint":null,"exit":2}', '{"error":"a","hint":"","exit":"2"}'],
)  # fmt: skip
def test_what_is_none_of_our_details(details):
    assert error_of(details) is None


def test_details_are_short_and_safe_in_a_terminal():
    _, details = status_of(errors.BadInput("x" * 5000, remedy="\x1b[2J\n" * 50))
    assert len(details) < 2 * MOST and details.isascii()
    back = error_of(details)
    assert len(str(back)) == MOST and back.remedy.isprintable()
    evil = error_of('{"error": "a\\u001b[2Jb\\nc", "hint": "", "exit": 77}')
    assert str(evil) == "a [2Jb c" and isinstance(evil, errors.Refused)
