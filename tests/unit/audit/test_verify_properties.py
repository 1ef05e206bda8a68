"""Whatever is done to the file of a trail without its key is found, and at the right line."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.audit.keys import SiteSigner
from fedcore.audit.lines import line_hash
from fedcore.audit.trail import TRAIL_FILE, AuditTrail
from fedcore.audit.verification import Anchor, verify
from fedcore.secagg.crypto.identity_key import IdentityKey
from tests.unit.audit.conftest import written

LINES = 12


def rows_of(data):
    return data.splitlines(keepends=True)


def end_of(data):
    """What a receipt for the last line confirms."""
    return Anchor(LINES, line_hash(rows_of(data)[-1][:-1]), "the coordinator")


def found(data, trusted, trail):
    return verify(data, trusted, [end_of(trail)]).findings


def first_change(old, new):
    """The number of the first line that is another one, from 1."""
    pairs = zip(rows_of(old), [*rows_of(new), *[b""] * LINES], strict=False)
    return next((n for n, (a, b) in enumerate(pairs, 1) if a != b), LINES + 1)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_every_edit_of_bytes_is_found_at_its_line(data, trail, trusted):
    at = data.draw(st.integers(0, len(trail) - 1))
    with_ = data.draw(st.binary(max_size=3))
    cut = data.draw(st.integers(0, 3))
    edited = trail[:at] + with_ + trail[at + cut :]
    findings = found(edited, trusted, trail)
    if edited == trail:
        assert findings == ()
    else:
        assert findings[0].line == first_change(trail, edited)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_deletion_is_found_where_the_lines_were(data, trail, trusted):
    first = data.draw(st.integers(0, LINES - 1))
    last = data.draw(st.integers(first + 1, LINES))
    rows = rows_of(trail)
    findings = found(b"".join(rows[:first] + rows[last:]), trusted, trail)
    assert findings[0].line == first + 1


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(LINES)))
def test_every_other_order_is_found_at_the_first_moved_line(order, trail, trusted):
    rows = rows_of(trail)
    moved = b"".join(rows[at] for at in order)
    findings = found(moved, trusted, trail)
    if moved == trail:
        assert findings == ()
    else:
        assert findings[0].line == first_change(trail, moved)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_repeated_or_foreign_line_is_found(data, trail, trusted):
    rows = rows_of(trail)
    at = data.draw(st.integers(0, LINES))
    foreign = st.binary(min_size=1, max_size=200).filter(lambda line: b"\n" not in line)
    line = data.draw(st.sampled_from(rows) | foreign.map(lambda line: line + b"\n"))
    findings = found(b"".join([*rows[:at], line, *rows[at:]]), trusted, trail)
    inserted = b"".join([*rows[:at], line, *rows[at:]])
    assert findings[0].line == first_change(trail, inserted)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_shorter_file_is_found_by_a_receipt(data, trail, trusted):
    cut = data.draw(st.integers(0, len(trail) - 1))
    shorter = trail[:cut]
    findings = found(shorter, trusted, trail)
    assert findings[0].line == shorter.count(b"\n") + 1


def test_shorter_file_without_receipts_is_not_found(trail, trusted):
    """What signatures and hashes alone cannot show."""
    assert verify(b"".join(rows_of(trail)[:7]), trusted).findings == ()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (8, "line 12: number 12 is another line than the coordinator confirms"),
        (3, "line 9: cut off: numbers 9 to 12 are missing, which the coordinator confirms"),
    ],
)
def test_end_written_again_with_the_key_is_found_by_a_receipt_only(
    tmp_path, trail, trusted, more, expected
):
    rows = rows_of(trail)
    (tmp_path / TRAIL_FILE).write_bytes(b"".join(rows[:5]))
    again = written(tmp_path, lines=more)
    assert verify(again, trusted).findings == ()
    assert [str(each) for each in verify(again, trusted, [end_of(trail)]).findings] == [expected]


def test_end_written_again_with_another_key_is_found_where_it_begins(tmp_path, trail, trusted):
    rows, other = rows_of(trail), IdentityKey()
    (tmp_path / TRAIL_FILE).write_bytes(b"".join(rows[:5]))
    with AuditTrail.open(tmp_path, SiteSigner(other), {"party": "site va"}) as forged:
        forged.record("sent", job="heart-1")
    with AuditTrail.open(tmp_path, SiteSigner(IdentityKey(bytes(range(32)))), {}):
        pass
    findings = verify((tmp_path / TRAIL_FILE).read_bytes(), trusted).findings
    assert [each.line for each in findings] == [6, 7]
    assert "another key" in findings[0].what
