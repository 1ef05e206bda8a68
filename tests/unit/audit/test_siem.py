"""Exports as log collectors read them: RFC 5424, CEF, JSON lines, whatever a fact contains."""

import json
import re

import pytest

from fedcore.audit.lines import EVENTS, Line
from fedcore.audit.siem import exported, in_words

EVIL = 'a"b\\c]d=e|f\ng\r\nh\u2028i'


def line(event="refused", **facts):
    return Line(7, "2026-11-30T09:15:02.120Z", event, facts, "0" * 64, b"s" * 64)


def one(form, found):
    (text,) = exported([found], form, "site va", "host1", "0.1.0")
    assert len(text.splitlines()) == 1
    return text


def test_syslog_is_rfc_5424_and_its_values_are_read_back():
    text = one("syslog", line(text=EVIL, bytes=12))
    head = re.fullmatch(
        r"<(\d+)>1 (\S+) host1 fedcore - refused \[fedcore@32473 (.*)\] refused", text
    )
    assert head[1] == str(13 * 8 + 4)
    assert head[2] == "2026-11-30T09:15:02.120Z"
    pairs = re.findall(r'([!-<>-\\^-~]{1,32})="((?:[^"\\\]]|\\["\\\]])*)"', head[3])
    found = {name: re.sub(r"\\(.)", r"\1", value) for name, value in pairs}
    assert found["text"] == 'a"b\\c]d=e|f g  h i'
    assert (found["line"], found["party"], found["bytes"]) == ("7", "site va", "12")
    assert len(found["lineHash"]) == 64


def test_cef_is_escaped_and_its_values_are_read_back():
    text = one("cef", line(reason=EVIL, job="heart=1", bytes=12))
    parts = re.split(r"(?<!\\)\|", text, maxsplit=7)
    assert parts[0] == "CEF:0"
    assert parts[4:7] == ["refused", "refused", "6"]
    pairs = dict(re.findall(r"(\w+)=((?:[^=\\]|\\.)*)(?: (?=\w+=)|$)", parts[7]))
    assert pairs["reason"] == 'a"b\\\\c]d\\=e|f\\ng\\nh\\ni'
    assert (pairs["cs1"], pairs["cs1Label"], pairs["out"]) == ("heart\\=1", "job", "12")
    assert (pairs["rt"], pairs["externalId"]) == ("1796030102120", "7")


def test_facts_named_like_those_of_the_line_do_not_hide_them():
    found = line("receipt", number=3, hash="ab", line=1)
    assert 'lineHash="' in one("syslog", found)
    assert "externalId=7" in one("cef", found)
    assert "fedcoreNumber=3" in one("cef", found)


def test_jsonl_is_the_line_itself():
    found = line(text=EVIL)
    assert one("jsonl", found).encode() == found.to_bytes()
    assert json.loads(one("jsonl", found))["facts"] == {"text": EVIL}


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_has_words_in_one_line(event):
    found = in_words(line(event, job="heart-1", text=EVIL, sha256="ab" * 32, vetoed=[]))
    assert len(found.splitlines()) == 1
    assert found.startswith(EVENTS[event])
    assert "ab" * 8 in found
    assert "ab" * 9 not in found
    assert "vetoed" not in found


def test_vector_in_words():
    facts = {"job": "heart-1", "what": "vector", "bytes": 4608, "sha256": "ab" * 32}
    about = {"purpose": "update", "round": 3, "number": 4, "header": "cd" * 32}
    assert in_words(line("sent", **facts, **about)) == (
        "left this party: vector, of update, round 3, job heart-1, bytes 4,608, sha256 abababababababab"
    )
