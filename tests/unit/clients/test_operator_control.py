"""pause, resume, leave and veto: the file that has them, the process that obeys, and the hours of a policy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from fedcore_clients import control
from fedcore_clients.app import Site
from fedcore_clients.cli import main
from fedcore_clients.control import ControlFile, read_control
from fedcore_clients.hours import DAYS, Hours
from fedcore_clients.policy import PolicySection, SitePolicy
from fedcore_clients.session import Session
from fedcore_clients.status import under_way, veto_job
from pydantic import ValidationError
from support.deployed_jobs import certificate, loaded, offered, submitted
from support.policies import BENCH, policy_of

from fedcore.audit.noted import user_name, waiting_notes
from fedcore.errors import BadInput, Refused, UnknownName
from fedcore.files import write_json
from fedcore.files.lock import FileLock
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol import messages
from fedcore.wire.records import TO_SITE, pack_record
from tests.support.live_sessions import recorded, site_process, until


def test_what_the_operator_said_outlives_every_process(tmp_path):
    assert read_control(tmp_path).away == ""
    control.pause(tmp_path)
    control.veto(tmp_path, "j1")
    found = ControlFile(tmp_path)
    assert found.refresh() and not found.refresh()
    assert (found.now.away, found.now.vetoed) == ("paused", ("j1",))
    assert "paused by its operator since" in found.now.text and "fed-site resume" in found.now.text
    control.leave(tmp_path, ["j2", "j1"])
    assert found.refresh() and (found.now.away, found.now.vetoed) == ("left", ("j1", "j2"))
    control.resume(tmp_path)
    assert found.refresh() and (found.now.away, found.now.vetoed) == ("", ("j1", "j2"))
    for name in (control.CONTROL_FILE, control.LOCK_FILE):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_two_commands_at_once_do_not_lose_a_word(tmp_path):
    lock = FileLock(tmp_path / control.LOCK_FILE, Refused)
    with pytest.raises(Refused, match=rf"found process {os.getpid()} changing it"):
        control.pause(tmp_path)
    lock.release()
    control.pause(tmp_path)
    assert read_control(tmp_path).away == "paused"


def test_commands_while_the_site_is_stopped_are_signed_at_its_next_start(va, capsys):
    """Also of a pause that is over by then, of which the process sees no trace in control.json."""
    folder, asked = va / "state", ("verify", "show")

    async def started():
        async with site_process(va):
            await until(lambda: not waiting_notes(folder))

    asyncio.run(started())
    control.pause(folder)
    control.resume(folder)
    control.leave(folder, ["j1"])
    assert waiting_notes(folder) == 3
    assert not recorded(folder, "operator"), "control: nothing has signed them yet"
    for word in asked:
        with pytest.raises(SystemExit):
            main(["audit", word, "--config", str(va / "site.toml")])
        said = "".join(capsys.readouterr())
        assert (
            "note: 3 commands are not in the trail and not signed until the process starts" in said
        )
    asyncio.run(started())
    found = recorded(folder, "operator")
    assert [each["call"] for each in found] == ["pause", "resume", "leave"]
    assert found[2]["jobs"] == ["j1"]
    assert {each["user"] for each in found} == {user_name()}
    with pytest.raises(SystemExit) as ended:
        main(["audit", "verify", "--config", str(va / "site.toml")])
    assert ended.value.code == 0 and "commands" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", '{"away": "gone", "since": 1, "vetoed": []}', "[1]"])
def test_a_damaged_file_pauses_the_site(tmp_path, text):
    (tmp_path / control.CONTROL_FILE).write_text(text)
    found = ControlFile(tmp_path)
    assert found.refresh() and found.now.away == "paused" and found.problem
    with pytest.raises(BadInput):
        control.resume(tmp_path)
    (tmp_path / control.CONTROL_FILE).unlink()
    control.resume(tmp_path)
    assert found.refresh() and found.now.away == "" and not found.problem


def row(name, **changes):
    return {"job": name, "stage": "idle", "outcome": None} | changes


def test_a_veto_names_a_job_of_this_site_that_is_not_over(tmp_path):
    over = row("j0", stage="over", outcome="finished")
    status = {"running": False, "written": 0.0, "process": 1, "jobs": [over, row("j1")]}
    write_json(tmp_path / "status.json", status)
    assert under_way(tmp_path) == ["j1"]
    with pytest.raises(UnknownName):
        veto_job(tmp_path, "j9")
    with pytest.raises(Refused, match=r"over \(finished\)"):
        veto_job(tmp_path, "j0")
    assert veto_job(tmp_path, "j1")["job"] == "j1"
    assert read_control(tmp_path).vetoed == ("j1",)


def test_a_vetoed_job_is_left_at_once_and_told_by_one_word(tmp_path):
    found = offered(tmp_path, submitted(), submitted())
    found.context.policy.vetoed = ("job",)

    async def play():
        found.policy_changed()
        await found.mailbox.turn(found.handle, lambda: None)

    asyncio.run(play())
    assert found.link.said[-1] == job.SiteUnavailable("job", "a", "vetoed")
    assert found.job.part.out and "vetoed by this site's operator" in found.job.part.last_error


def test_a_job_vetoed_before_it_was_offered_reads_no_row(tmp_path):
    policy = policy_of()
    policy.vetoed = ("job",)
    refused = policy.on_offer(loaded(tmp_path, submitted()).offer)
    assert refused.word == "vetoed"
    assert policy_of().on_offer(loaded(tmp_path / "2", submitted()).offer) is None, "control"


# --------------------------------------------------------------------------------- the session


class Kept(Session):
    """A session that is open as long as it is wanted; goodbyes are kept."""

    def __init__(self):
        super().__init__(None, SimpleNamespace(addresses=[("h", 1)]), None, None, None, None)
        self.begun, self.told = 0, []

    async def _once(self):
        self.begun += 1
        await asyncio.Event().wait()

    async def goodbye(self, text, code="stopping"):
        self.told.append(code)


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_site_that_is_away_has_no_session_until_it_is_back():
    async def play():
        link = Kept()
        running = asyncio.get_running_loop().create_task(link.run())
        await settled()
        await link.go_away("paused")
        await link.go_away("left")
        await settled()
        assert (link.begun, link.told, link._presence.away) == (1, ["paused"], "left")
        link.come_back()
        await settled()
        assert link.begun == 2 and link._presence.away == ""
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        assert running.cancelled() and link._presence.attempt.cancelled()

    asyncio.run(play())


def test_a_process_that_starts_paused_begins_no_session():
    async def play():
        link = Kept()
        await link.go_away("paused")
        running = asyncio.get_running_loop().create_task(link.run())
        await settled()
        assert link.begun == 0
        running.cancel()

    asyncio.run(play())


# ----------------------------------------------------------------------------------- the hours


def at(text):
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "zone", "now", "until"),
    [
        ("mon-fri 20:00-06:00", "UTC", "2026-11-30T21:00", None),  # a Monday
        ("mon-fri 20:00-06:00", "UTC", "2026-12-01T05:59", None),
        ("mon-fri 20:00-06:00", "UTC", "2026-12-01T06:00", "2026-12-01T20:00"),
        ("mon-fri 20:00-06:00", "UTC", "2026-12-05T05:00", None),  # Friday's night
        ("mon-fri 20:00-06:00", "UTC", "2026-12-05T07:00", "2026-12-07T20:00"),
        ("08:00-09:00", "Europe/Berlin", "2026-11-30T07:30", None),
        ("08:00-09:00", "Europe/Berlin", "2026-11-30T08:30", "2026-12-01T07:00"),
        ("sat,sun 00:00-24:00; wed 12:00-13:00", "UTC", "2026-12-02T12:30", None),
        ("sat,sun 00:00-24:00; wed 12:00-13:00", "UTC", "2026-12-02T13:00", "2026-12-05T00:00"),
        ("fri-mon 10:00-11:00", "UTC", "2026-12-01T10:30", "2026-12-04T10:00"),
        ("mon 10:00-11:00", "UTC", "2026-11-30T11:00", "2026-12-07T10:00"),
        ("02:30-03:00", "Europe/Berlin", "2026-03-28T12:00", "2026-03-29T01:30"),  # clocks change
        (None, "UTC", "2026-11-30T21:00", None),
    ],
)
def test_outside_the_hours_it_is_said_until_when(hours, zone, now, until):
    policy = SitePolicy(PolicySection(hours=hours, time_zone=zone), 4, BENCH)
    found = policy.closed_until(at(now))
    assert found == (None if until is None else at(until))


@pytest.mark.parametrize(
    "wrong",
    ["", "mon", "20:00", "mon-fry 20:00-06:00", "mon 25:00-26:00", "mon 10:00-11:60",
     "mon 10:00-11:00;", "mon 8-9", "mon 24:00-08:00"],
)  # fmt: skip
def test_hours_in_another_form_are_refused(wrong):
    with pytest.raises(ValidationError, match="such as 'mon-fri 20:00-06:00'"):
        PolicySection(hours=wrong)


def test_an_unknown_time_zone_is_refused():
    for wrong in ("Berlin", "", "../etc/passwd", "CET+1"):
        with pytest.raises(ValidationError, match="such as 'Europe/Berlin'"):
            PolicySection(time_zone=wrong)
    assert Hours.of(None, "UTC").closed_until(at("2026-11-30T21:00")) is None


def site_of(folder, **rules):
    """A site whose policy has these rules, and its one job, which has a plan; it is in no round."""
    found = offered(folder, submitted(), submitted(), **rules)
    about = SimpleNamespace(addresses=[("h", 1)], policy_file=None, folder=folder)
    site = Site(about, None, found.context, found.contributor)
    site.session, site.jobs = Kept(), {"job": found}
    return site, found


def announced():
    header = certificate().header
    return pack_record("job", messages.Announce(header), TO_SITE)


def test_outside_its_hours_a_site_joins_no_round_and_then_ends_its_session(tmp_path):
    day = datetime.now(UTC) + timedelta(days=3)
    site, found = site_of(tmp_path, hours=f"{DAYS[day.weekday()]} 10:00-11:00")

    async def play():
        before = found.mailbox.backlog
        site._on_frame(announced())
        assert found.mailbox.backlog == before, "it does not answer the invitation"
        await site._obey()
        assert site.session.told == ["hours"]
        assert f"no new round before {day:%a %d %b} 10:00 UTC" in site.status()["away"]
        found.context.policy.rules = policy_of().rules
        await site._obey()
        assert site.session._presence.away == "" and site.status()["away"] == ""
        before = found.mailbox.backlog
        site._on_frame(announced())
        assert found.mailbox.backlog == before + 1, "control"

    asyncio.run(play())


def test_a_round_under_way_is_finished_after_the_hours(tmp_path, monkeypatch):
    day = datetime.now(UTC) + timedelta(days=3)
    site, found = site_of(tmp_path, hours=f"{DAYS[day.weekday()]} 10:00-11:00")
    monkeypatch.setattr(type(found.job), "in_round", True)

    async def play():
        site._on_frame(announced())
        assert found.mailbox.backlog, "a message of this round"
        await site._obey()
        assert site.session.told == [] and "no new round before" in site.away_text

    asyncio.run(play())
