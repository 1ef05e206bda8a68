"""A refusing site's sealed cause is carried by the coordinator, who can neither read, make nor move one."""

from __future__ import annotations

import asyncio
import logging

import pytest
from fedcore_clients.jobs import Party, SiteJob
from fedcore_clients.ledger import Ledger
from kit import refuses, world_at
from policies import policy_of

from fedcore.errors import EnvelopeRefused, HeaderRefused
from fedcore.protect.entropy import OsEntropy
from fedcore.protect.sealed import NOTICE_LENGTH, seal_notice
from fedcore.protect.sumtag import GroupSecret
from fedcore.protocol import job, site
from fedcore.protocol.messages import Notice
from fedcore.scheme import EpochSecrets
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool

CAUSE = "sum tag: found a wrong one, expected that of the survivors"


def deployed(world, name, folder):
    """A site's job at the stage that the site has in `world`."""
    with Journal.open(folder / "journal.sqlite", party=f"site {name}") as journal:
        member = world.members[name]
        party = Party(
            "clinics",
            name,
            member.identity,
            world.pins,
            journal,
            Spool(folder / "spool"),
            folder,
            policy_of(len(world.pins)),
            Ledger.open(folder, member.identity),
        )
        found = SiteJob(party, None, None, job.JobOffer("job", "t", "0" * 64, b"{}"))
        found.plan, found._member, found.stage = world.plan, member, world.stages[name]
        found.secrets = EpochSecrets(world.group, None)
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
        asyncio.run(found._on_message(notice))
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
    before = found.stage
    with pytest.raises(EnvelopeRefused):
        shown(found, Notice(world.h, "bob", FORGED[how](world)), caplog)
    assert not [r for r in caplog.records if "refused:" in r.getMessage()]
    assert found.stage is before
    after, _ = site.step(world.members["cat"], before, site.Received(world.certificate()), 0.0)
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
