"""An audit trail on disk: one process, kill -9, a torn end, a full disk, and what a line may have."""

import json
import os
import signal
import subprocess
import sys

import pytest
from support.full_disk import no_file_beyond

from fedcore.audit.keys import SiteSigner, site_key
from fedcore.audit.lines import Line
from fedcore.audit.trail import TRAIL_FILE, AuditTrail, NoTrail
from fedcore.audit.verification import verify
from fedcore.errors import StoreFull, StoreProblem
from fedcore.secagg.crypto.identity_key import IdentityKey

KEY = IdentityKey(bytes(range(32)))
TRUSTED = {site_key(KEY.public)}


def opened(folder, key=KEY):
    return AuditTrail.open(folder, SiteSigner(key), {"party": "site va"})


def lines_of(folder):
    return [Line.parse(raw) for raw in (folder / TRAIL_FILE).read_bytes().splitlines()]


def checked(folder):
    return verify((folder / TRAIL_FILE).read_bytes(), TRUSTED)


def test_lines_are_numbered_chained_and_signed(tmp_path):
    with opened(tmp_path) as trail:
        trail.record("decision", job="heart-1", word="accepted")
        trail.record("sent", job="heart-1", bytes=4096, sites=("va", "ch"))
    found = checked(tmp_path)
    assert found.findings == ()
    assert [(line.sequence, line.event) for line in found.lines] == [
        (1, "opened"), (2, "decision"), (3, "sent"),
    ]  # fmt: skip
    assert found.lines[2].facts == {"job": "heart-1", "bytes": 4096, "sites": ["va", "ch"]}
    assert found.head == (trail.sequence, trail.hash)


def test_trail_goes_on_after_a_restart(tmp_path):
    for _ in range(3):
        with opened(tmp_path) as trail:
            trail.record("connect", to="hub")
    assert checked(tmp_path).findings == ()
    assert [line.sequence for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_trail_is_for_its_user_only(tmp_path):
    before = os.umask(0)
    try:
        opened(tmp_path).close()
    finally:
        os.umask(before)
    assert (tmp_path / TRAIL_FILE).stat().st_mode & 0o077 == 0


def test_second_process_is_refused(tmp_path):
    with opened(tmp_path), pytest.raises(StoreProblem, match=f"in use by process {os.getpid()}"):
        opened(tmp_path)
    opened(tmp_path).close()


CHILD = """
import sys
from pathlib import Path
from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.secagg.crypto.identity_key import IdentityKey
trail = AuditTrail.open(Path(sys.argv[1]), SiteSigner(IdentityKey(bytes(range(32)))), {})
while True:
    trail.record("connect", to="hub")
    print(trail.sequence, flush=True)
"""


def test_every_recorded_line_survives_kill(tmp_path):
    with subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE) as child:
        for _ in range(20):
            told = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        child.wait()
    with opened(tmp_path):
        pass
    found = checked(tmp_path)
    assert found.findings == ()
    assert found.head[0] > told


@pytest.mark.parametrize(
    "end",
    [b'{"seq":3,"time":"20', b"\0" * 300, b"\n", b"{}\n", b'{"seq":3}\n{"seq":4}\n'],
    ids=["half", "zeros", "empty", "foreign", "two foreign"],
)
def test_damaged_end_is_kept_beside_and_stated(tmp_path, end):
    with opened(tmp_path) as trail:
        trail.record("connect", to="hub")
    with (tmp_path / TRAIL_FILE).open("ab") as file:
        file.write(end)
    assert [f.line for f in checked(tmp_path).findings][:1] == [3]
    opened(tmp_path).close()
    assert checked(tmp_path).findings == ()
    *_, again, torn = lines_of(tmp_path)
    assert (again.event, torn.event) == ("opened", "torn")
    assert torn.facts["bytes"] == len(end)
    assert (tmp_path / torn.facts["file"]).read_bytes() == end


def test_last_line_torn_anywhere_leaves_a_sound_trail(tmp_path):
    with opened(tmp_path) as trail:
        trail.record("connect", to="hub")
    whole = (tmp_path / TRAIL_FILE).read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole), 29):
        (tmp_path / TRAIL_FILE).write_bytes(whole[:cut])
        opened(tmp_path).close()
        found = checked(tmp_path)
        assert found.findings == (), cut
        assert [line.event for line in found.lines] == ["opened", "opened", "torn"]


def test_full_disk_keeps_nothing_of_a_line_and_goes_on_later(tmp_path):
    with opened(tmp_path) as trail:
        trail.record("connect", to="hub")
        size = (tmp_path / TRAIL_FILE).stat().st_size
        for room in (0, 1, 100):
            with no_file_beyond(size + room), pytest.raises(StoreFull, match="no room"):
                trail.record("sent", bytes=1)
            assert (tmp_path / TRAIL_FILE).stat().st_size == size
        trail.record("sent", bytes=1)
    assert checked(tmp_path).findings == ()
    assert lines_of(tmp_path)[-1].sequence == 3


def test_closed_trail_records_nothing(tmp_path):
    trail = opened(tmp_path)
    trail.close()
    with pytest.raises(StoreProblem, match="closed"):
        trail.record("connect", to="hub")
    assert len(lines_of(tmp_path)) == 1


@pytest.mark.parametrize("fact", [0.5, b"key", None, {"a": 1}, [0.5], [b"k"]])
@pytest.mark.parametrize("recorder", ["trail", "none"])
def test_fact_that_may_be_a_value_or_a_key_is_refused(tmp_path, fact, recorder):
    with opened(tmp_path) as trail:
        found = trail if recorder == "trail" else NoTrail()
        with pytest.raises(TypeError, match="audit: x: found"):
            found.record("sent", x=fact)
    assert len(lines_of(tmp_path)) == 1


def test_event_without_a_name_is_refused(tmp_path):
    with opened(tmp_path) as trail, pytest.raises(ValueError, match="'party'"):
        trail.record("party", x=1)


def test_text_of_another_party_stays_one_short_line(tmp_path):
    with opened(tmp_path) as trail:
        trail.record("refused", text="a\nb\u2028c" + "x" * 5000)
    raw = (tmp_path / TRAIL_FILE).read_bytes()
    assert raw.count(b"\n") == 2
    assert len(json.loads(raw.splitlines()[1])["facts"]["text"]) == 4096
    assert checked(tmp_path).findings == ()
