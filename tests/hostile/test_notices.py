"""A refusing site's sealed cause is carried by the coordinator, who can neither read, make nor move one."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

import pytest
from fedcore_clients.context import SiteContext
from fedcore_clients.job_runner import JobRunner
from fedcore_clients.ledger import Ledger
from kit import refuses, world_at
from support.machines import patch_machine
from support.policies import policy_of

from fedcore.errors import HeaderRefused
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.sealed import NOTICE_LENGTH, seal_notice
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.protocol import effects, epoch
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.job.site.events import MessageReceived
from fedcore.secagg.protocol.job.site.machine import Kept
from fedcore.secagg.protocol.job.site.participation import Agreed
from fedcore.secagg.protocol.messages import LEFT, MATERIAL, Leave, Notice
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import encode
from fedcore.secagg.scheme import EpochSecrets
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool

CAUSE = "sum tag: found a wrong one, expected that of the survivors"


def deployed(world, name, folder, link=None):
    """A site's job at the stage that the site has in `world`."""
    with Journal.open(folder / "journal.sqlite", party=f"site {name}") as journal:
        member = world.members[name]
        context = SiteContext(
            "clinics",
            name,
            member.identity,
            RosterFile(PinnedRoster(world.pins)),
            journal,
            Spool(folder / "spool"),
            folder,
            policy_of(len(world.pins)),
            Ledger.open(folder, member.identity),
        )
        found = JobRunner(context, link, None, job.JobOffer("job", "t", "0" * 64, b"{}"))
        found.job.restored(
            Kept(
                Agreed(world.plan, 0, ()), "", world.stages[name], None, None, epoch.NoKey(), {},
                (world.h, {}), "",
            )
        )  # fmt: skip
        found.job.parts.rounds.base_member = member
        found.job.parts.keys.secrets = EpochSecrets(world.group, None)
        yield found


@pytest.fixture
def cat(tmp_path):
    """(world, cat's job): everybody has stated what is in the sum."""
    world = world_at("state")
    for found in deployed(world, "cat", tmp_path):
        yield world, found


def sealed(world, text=CAUSE, by="bob", header=b"", group=None):
    return seal_notice(
        group or world.group, text, header=header or world.h, site=by, entropy=OsEntropy()
    )


def shown(found, notice, caplog):
    """What the site's log says of a notice."""
    with caplog.at_level(logging.INFO):
        asyncio.run(found.handle(MessageReceived(notice)))
    return [record.getMessage() for record in caplog.records]


def test_a_notice_is_shown(cat, caplog):
    """The control of what follows."""
    world, found = cat
    notice = Notice(world.h, "bob", sealed(world))
    assert shown(found, notice, caplog) == [f"site bob refused: {CAUSE}"]


def flipped(data):
    return data[:-1] + bytes([data[-1] ^ 1])


FORGED = {
    "noise": lambda world: bytes(range(256)) * 3,
    "noise of the right length": lambda world: OsEntropy().draw(NOTICE_LENGTH),
    "nothing": lambda world: b"",
    "cut short": lambda world: sealed(world)[:-1],
    "one bit changed": lambda world: flipped(sealed(world)),
    "that of another site": lambda world: sealed(world, by="ann"),
    "that of another round": lambda world: sealed(world, header=bytes(32)),
    "under a secret of its own": lambda world: sealed(world, group=GroupSecret()),
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_notice_is_not_shown_and_ends_nothing(cat, caplog, how):
    """A coordinator wants cat's operator to believe that bob refused, or cat to leave the round."""
    world, found = cat
    before = found.job.stage
    shown(found, Notice(world.h, "bob", FORGED[how](world)), caplog)
    assert not [r for r in caplog.records if "refused:" in r.getMessage()]
    assert found.job.part.last_error and found.job.stage is before
    after, _ = site.step(
        world.members["cat"], before, site.MessageFromCoordinator(world.certificate()), 0.0
    )
    assert isinstance(after, site.Idle)
    assert after.standing.released == world.round_header.round


def test_a_notice_of_another_round_is_refused_by_its_header(cat):
    world, _ = cat
    notice = Notice(bytes(32), "bob", sealed(world, header=bytes(32)))
    refuses(world, "cat", notice, HeaderRefused)


def test_a_colluding_site_writes_one_line_in_a_known_name(cat, caplog):
    """Who holds G can say anything in any site's name: it stays one line, and moves no cursor."""
    world, found = cat
    text = "tag\n12:00:00 ERROR   the disk is full\x1b[2J\u202eelif"
    (line,) = shown(found, Notice(world.h, "bob", sealed(world, text)), caplog)
    assert line.isprintable()
    assert line.startswith("site bob refused: tag 12:00:00")
    caplog.clear()
    strange = "bob\nERROR"
    (line,) = shown(found, Notice(world.h, strange, sealed(world, by=strange)), caplog)
    assert line == f"site not in the roster refused: {CAUSE}"


# ------------------------------------------------------- a parcel that another site signed and spoilt


class Said:
    """A session that keeps what is said in it."""

    def __init__(self):
        self.messages = []

    def say(self, job, message):
        self.messages.append(message)

    def doing(self, job, what):
        pass


def spoilt(parcel):
    if parcel.recipient != "cat":
        return parcel
    return replace(parcel, envelope=parcel.envelope[:-1] + bytes([parcel.envelope[-1] ^ 1]))


def victim_says(folder, delivery_of):
    """What cat, as it is deployed, says after a delivery, and its world."""
    world, link = world_at("shares"), Said()
    for found in deployed(world, "cat", folder, link):
        asyncio.run(found.handle(MessageReceived(delivery_of(world))))
    return world, next(each for each in link.messages if isinstance(each, Leave))


def by_ann(world):
    return world.delivery("cat", shares={"ann": world.lying_shares("ann", spoilt)})


def collecting(world):
    keys = tuple(world.keys[name] for name in world.roster)
    shares = tuple(world.shares[name] for name in world.roster)
    return coordinator.Collecting(world.round_header, 1, 0, keys, shares, until=9.0)


def test_a_bad_envelope_names_its_sender_to_the_sites_and_one_word_to_the_coordinator(
    tmp_path, caplog
):
    world, leave = victim_says(tmp_path / "cat", by_ann)
    assert (leave.code, len(leave.sealed)) == (MATERIAL, NOTICE_LENGTH)
    assert b"ann" not in encode(leave)

    hub, stage = coordinator.CoordinatorParams(world.pins), collecting(world)
    after, done = coordinator.step(hub, stage, coordinator.MessageFromSite("cat", leave), 0.0)
    assert after.gone == ("cat",)
    sent = {each.to: each.message for each in done if isinstance(each, effects.Send)}
    assert sent.keys() == set(world.roster) - {"cat"}
    (warning,) = [each.text for each in done if isinstance(each, effects.Warn)]
    assert warning.startswith("round 1: site cat left over another site's material")
    assert "ann" not in warning

    # Every other site is further by now: the notice is taken at each of their stages.
    for reached in ("shares", "submit", "confirm", "unmask"):
        other = world_at(reached)
        before = other.stages["bob"]
        (shows,) = site.step(
            other.members["bob"],
            before,
            site.MessageFromCoordinator(replace(sent["bob"], header=other.h)),
            0.0,
        )[1]
        assert isinstance(shows, effects.ShowNotice)
    caplog.clear()
    for found in deployed(world, "bob", tmp_path / "bob"):
        (line,) = shown(found, sent["bob"], caplog)
    assert line.startswith("site cat refused: ")
    assert line.endswith("(fault: ann)")


def test_control_without_the_complaint_only_the_victims_log_names_the_liar(tmp_path, monkeypatch):
    patch_machine(monkeypatch, site, "_is_anothers_material", lambda *_: False)
    _, leave = victim_says(tmp_path, by_ann)
    assert leave == Leave(leave.header, "cat", LEFT)


def test_what_the_coordinator_can_have_changed_is_blamed_on_no_site(tmp_path):
    """It alters a parcel on the way: the digest that ann signed does not fit, and nobody hears of ann."""

    def altered(world):
        found = world.delivery("cat")
        return replace(found, parcels=(spoilt(found.parcels[0]), *found.parcels[1:]))

    _, leave = victim_says(tmp_path, altered)
    assert leave == Leave(leave.header, "cat", LEFT)


def test_a_false_accusation_sends_away_only_who_makes_it():
    """dan holds G, so it can say anything of bob; bob stays in the round, and the coordinator hears no name."""
    world = world_at("shares")
    lie = sealed(world, "envelope: found noise (fault: bob)", by="dan")
    leave = Leave(world.h, "dan", MATERIAL, lie)
    hub = coordinator.CoordinatorParams(world.pins)
    after, done = coordinator.step(
        hub, collecting(world), coordinator.MessageFromSite("dan", leave), 0.0
    )
    assert after.gone == ("dan",)
    assert "bob" in coordinator.waiting_for(after)
    assert not any("bob" in each.text for each in done if isinstance(each, effects.Warn))
