"""What the shells check themselves, around the machines: a round out of the job's course, another sum than
the announced one, an upload that no round waits for, a record of another site.

Each lie is refused by one line of a shell, and the control is the same lie with that line switched off.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from types import SimpleNamespace

import fedcore_clients.round_work
import numpy as np
import pytest
from fedcore_server.coordinator import Coordinator
from fedcore_server.job_runner import JobRunner
from fedcore_server.site_api import Transfers
from support.deployed_jobs import SITES, coordinated, loaded, plan_for, submitted

from fedcore.config import build_job, plan_of
from fedcore.errors import (
    BadInput,
    CertificateRefused,
    PeerRefused,
    ReleaseRefused,
    StoreProblem,
    TagRefused,
)
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.plan import RoundHeader, canonical
from fedcore.secagg.protocol import effects, job_messages, messages, schedule
from fedcore.secagg.protocol.job.site.events import MessageReceived
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.store import container
from fedcore.wire import frames
from fedcore.wire.records import TO_COORDINATOR

# ------------------------------------------------------------ a round out of the job's course


def in_epoch(folder, protection, done=None):
    """Site a of four with a plan of two rounds and a key epoch. done: the last step released here."""
    settings = submitted(protect={"protection": protection})
    shape = loaded(folder / "shape", settings).job.part.survey.shape
    plan = plan_of(build_job(settings), shape, SITES, 64)
    found = loaded(
        folder / "site", settings, job_messages.PlanOffer("job", canonical(plan.to_json()))
    )
    parts = found.job.parts
    payload = SecretBytes(parts.keys.scheme.make_payload())
    parts.keys.use(payload, "a")
    parts.rounds.stage = site.Idle(SiteProgress(1, key_id(payload.reveal())))
    found.job.states.current = replace(found.job.state, done=done)
    return found


def header_of(found, purpose, training_round, number=1):
    plan, pins = found.job.plan, found.roster.digest
    return RoundHeader(
        "town", "job", 1, number, training_round, purpose, SITES, pins, plan.threshold,
        plan.protection, plan.digest,
    )  # fmt: skip


def invited(found, header):
    """What site a says to a round."""
    before = len(found.link.said)

    async def play():
        await found.handle(MessageReceived(messages.Announce(header)))
        await found.close()

    asyncio.run(play())
    return found.link.said[before:]


UPDATE_1, UPDATE_2 = schedule.PlannedRound("update", 1), schedule.PlannedRound("update", 2)


@pytest.mark.parametrize(
    ("done", "purpose", "training_round"),
    [
        (None, "range", 0),  # the plan states the range
        (None, "statistics", 0),  # no column is standardised
        (None, "update", 0),
        (None, "update", 3),  # of two
        (None, "metrics", 2),
        (UPDATE_1, "update", 1),  # the same step again, from another state
        (UPDATE_2, "update", 1),
        (UPDATE_2, "update", 2),
        (schedule.PlannedRound("metrics", 3), "metrics", 3),  # the job is done
        (schedule.PlannedRound("metrics", 3), "update", 2),
    ],
)
def test_a_round_out_of_the_jobs_course_is_not_joined(
    done, purpose, training_round, tmp_path, without
):
    """Its rows would enter a sum twice, or one that the plan does not have."""
    found = in_epoch(tmp_path / "1", "masked", done)
    said = invited(found, header_of(found, purpose, training_round))
    assert [type(each) for each in said] == [messages.Leave, job_messages.SiteStatus]
    assert isinstance(found.job.stage, site.Idle) and found.job.stage.standing.round == 0
    assert found.job.part.last_error.startswith("step: found ")
    control = in_epoch(tmp_path / "2", "masked", done)
    without(schedule, "check_step")
    (keys,) = invited(control, header_of(control, purpose, training_round))
    assert isinstance(keys, messages.Keys)


@pytest.mark.parametrize(
    ("done", "purpose", "training_round"),
    [
        (None, "update", 1), (None, "update", 2), (UPDATE_1, "update", 2),
        (UPDATE_1, "metrics", 3), (UPDATE_2, "metrics", 3),
    ],
)  # fmt: skip
def test_a_round_in_the_jobs_course_is_joined(done, purpose, training_round, tmp_path):
    """A site may have missed rounds that were abandoned."""
    found = in_epoch(tmp_path, "masked", done)
    (keys,) = invited(found, header_of(found, purpose, training_round))
    assert isinstance(keys, messages.Keys)


LAST = "c" * 64
LIES = {
    "federation": ("federation", ["", "Town", "town "]),
    "job": ("job", ["", "job2"]),
    "epoch": ("key epoch", [-1, 0, 2, 1 << 62]),
    "round": ("round", [-1, 0, 3, 4]),
    "training_round": ("step", [-1, 0, 3, 1 << 62]),
    "purpose": ("step", ["", "statistics", "range", "metrics", "Update"]),
    "roster": ("roster", [
        (), ("a",), SITES[:2], SITES[1:], SITES[::-1], ("b", "a", "c"), (*SITES, "e"),
        (*SITES[:3], "a"), (*SITES[:3], "D"),
    ]),
    "pins": ("pinned keys", ["", "0" * 64]),
    "threshold": ("threshold", [-1, 0, 1, 2, 4, 5]),
    "protection": ("protection", ["", "plain", "encrypted", "layered", "Masked"]),
    "plan_digest": ("plan digest", ["", "0" * 64]),
    "certificate": ("release certificate", ["", "d" * 64, LAST.upper()]),
    "version": ("protocol version", [-1, 0, 99]),
}  # fmt: skip
"""Field of a round's header: the first words of the refusal, and what a coordinator may say instead."""


def test_every_field_of_a_header_is_in_the_table():
    assert set(LIES) == {each.name for each in fields(RoundHeader)}


@pytest.mark.parametrize("name", LIES)
def test_a_header_with_one_field_altered_is_refused_by_the_name_of_the_field(name, tmp_path):
    """At the whole site. The control is the header as it should be, taken afterwards."""
    found = in_epoch(tmp_path, "masked")
    standing = replace(found.job.stage.standing, round=4, certificate=LAST, released=4)
    found.job.parts.rounds.stage = site.Idle(standing)
    good = replace(header_of(found, "update", 1, number=5), certificate=LAST)
    word, lies = LIES[name]
    for lie in lies:
        assert lie != getattr(good, name)
        said = invited(found, replace(good, **{name: lie}))
        assert found.job.part.last_error.startswith(f"{word}: found "), (
            lie,
            found.job.part.last_error,
        )
        assert [type(each) for each in said] == [messages.Leave, job_messages.SiteStatus], lie
        assert found.job.stage == site.Idle(standing)
    (keys,) = invited(found, good)
    assert isinstance(keys, messages.Keys) and keys.header == good.digest


# ------------------------------------------------------------ another sum than the announced one


def vectors(work, header, tag):
    """The slots of four sites, each with its share of the tag."""
    layout = work.layout(header)
    ask = effects.MakeVector(header, tag, ())
    for place, name in enumerate(SITES):
        values = np.arange(work.agreed.plan.coordinates, dtype=np.uint64) + np.uint64(1 + place)
        wides = {wide.name: [1] * wide.count for wide in layout.spec.wides}
        wides |= {mark: [0] for mark in layout.spec.marks}
        slots = layout.pack(values, wides, place)
        work.secrets.put_tag(slots, layout, ask, name)
        yield slots


def summed(work, scheme, header, tag, slots):
    """The chunks of the sum of these vectors, each encrypted anew; their masks would cancel."""
    fold, ask = scheme.fold(len(slots[0])), effects.MakeVector(header, tag, ())
    layout = work.layout(header)
    for name, each in zip(SITES, slots, strict=True):
        chunks, _ = work.secrets.protect(each.copy(), layout, ask, name, OsEntropy())
        for place, chunk in enumerate(chunks):
            fold.add(place, chunk)
    return [bytes(chunk) for chunk in fold.total()]


def test_other_bytes_than_announced_are_not_opened_even_where_the_tag_holds(tmp_path, stand_in):
    """Two ciphertexts of one sum: the second is not the one whose digest every site was told. Nor is a sum
    taken whose mark in this site's place, 0, is not the one that the site has kept, 1."""
    found = in_epoch(tmp_path, "layered")
    header = header_of(found, "update", 1)
    work, scheme = found.work.round_work(), found.job.parts.keys.scheme
    tag = work.secrets.tag(header, work.state.canonical())
    marks = dict.fromkeys(work.layout(header).spec.marks, 0)
    slots = list(vectors(work, header, tag))
    told, other = (summed(work, scheme, header, tag, slots) for _ in range(2))
    assert told != other
    asked = effects.OpenSum(
        header=header, survivors=SITES, state_tag=tag, salts=(b"",) * len(SITES),
        digest=container.vector_digest(told), size=sum(map(len, told)),
    )  # fmt: skip
    opened = work.open(asked, told, marks).opened
    with pytest.raises(ReleaseRefused, match="sum: found other bytes than announced"):
        work.open(asked, other, marks)
    with pytest.raises(TagRefused, match="in this site's place that it did not put"):
        work.open(asked, told, dict.fromkeys(marks, 1))
    stand_in(fedcore_clients.round_work, announced=lambda chunks, _: iter(chunks))
    assert work.open(asked, other, marks).opened == opened, "control"


# ------------------------------------------------------------ an upload that no round waits for


def collecting(folder):
    """A coordinator whose job waits for the vectors of a, b and c; d was not invited."""
    found = coordinated(folder, plan_for("encrypted"))
    header = RoundHeader(
        "town", "job", 1, 1, 1, "update", SITES[:3], found.roster.digest, 3,
        "encrypted", found.facts.plan.digest,
    )  # fmt: skip
    found.facts.stage, _ = coordinator.step(
        coordinator.CoordinatorParams(found.roster.sites),
        coordinator.Ready(),
        coordinator.Start(header, 1000),
        0.0,
    )
    assert isinstance(found.facts.stage, coordinator.Collecting)
    hub = Coordinator(found.context, None)
    hub.jobs["job"] = found
    return hub, header.digest


def sends(hub, name, header, size=1000, of="job"):
    """Whether a vector of this site was spooled."""
    chunks = [bytes(size)]
    data = container.to_bytes(chunks)
    start = frames.UploadStart(of, header, container.vector_digest(chunks), len(data))
    return Transfers(hub).small(name, start, data)


UNASKED = {
    "a site that was not invited": ("d", lambda header: header, 1000),
    "another round": ("a", lambda _: b"r" * 32, 1000),
    "more bytes than a vector has": ("a", lambda header: header, 5000),
}


@pytest.mark.parametrize("what", UNASKED)
def test_an_upload_that_no_round_waits_for_is_not_spooled(what, tmp_path, without, caplog):
    """Else any site fills the coordinator's disk."""
    hub, header = collecting(tmp_path)
    name, lie, size = UNASKED[what]
    assert not sends(hub, name, lie(header), size)
    assert "upload: found one" in caplog.text
    assert hub.context.spool.rounds("job") == [] and hub.jobs["job"].mailbox.backlog == 0
    assert not sends(hub, name, lie(header), size, of="another job")
    without(JobRunner, expects=lambda *_: True)
    sends(hub, name, lie(header), size)
    assert hub.context.spool.rounds("job") == [lie(header)], "control: it is on the disk"


def test_the_vector_that_a_round_waits_for_is_spooled(tmp_path):
    hub, header = collecting(tmp_path)
    assert sends(hub, "a", header)
    assert set(hub.context.spool.complete("job", header)) == {"a"}
    assert hub.jobs["job"].mailbox.backlog == 1


def test_a_transfer_that_no_round_waits_for_is_refused_before_its_first_part(tmp_path):
    hub, header = collecting(tmp_path)
    start = frames.UploadStart("job", header, b"d" * 32, 1000)
    with pytest.raises(BadInput, match="upload: found one"):
        Transfers(hub).open_upload("d", start)
    assert hub.context.spool.rounds("job") == []
    Transfers(hub).open_upload("a", start)


# ------------------------------------------------------------------------ a certificate is revoked


def test_a_revocation_that_the_disk_refuses_is_recorded_later(tmp_path, monkeypatch):
    """And the checks of the sessions go on."""
    found = coordinated(tmp_path)

    def still(peer):
        raise CertificateRefused(f"{peer}: revoked", check="revoked")

    hub = Coordinator(found.context, SimpleNamespace(still=still))
    hub.adopt(found)
    hub.sessions.last_peers["a"] = SimpleNamespace(fingerprint="f" * 64, serial="1")
    with monkeypatch.context() as patch:
        patch.setattr(found.disk, "put", refuses)
        hub.withdraw()
    assert found.facts.withdrawn == set() and "a" in hub.sessions.last_peers
    hub.withdraw()
    assert found.facts.withdrawn == {"a"} and not hub.sessions.last_peers
    assert found.context.journal.get("job", "withdrawn") == b'["a"]'


def refuses(_):
    raise StoreProblem("journal: found the disk full")


# -------------------------------------------------------------------- a record of another site

KINDS = [entry.kind for entry in TO_COORDINATOR.values()]
OWN = [kind for kind in KINDS if "site" in {each.name for each in fields(kind)}]
"""Every record that says itself which site it is of."""


def blank(kind, name):
    """A record of this type in which nothing is right but its site."""
    found = object.__new__(kind)
    for each in fields(kind):
        object.__setattr__(found, each.name, name if each.name == "site" else b"")
    return found


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.__name__)
def test_a_record_of_another_site_is_refused_whatever_it_says(kind, tmp_path):
    found = coordinated(tmp_path)
    before = {name: replace(view) for name, view in found.facts.sites.items()}
    with pytest.raises(PeerRefused, match="record: found one of another site from a"):
        found.machine.on_message("a", blank(kind, "b"))
    assert found.facts.sites == before


def test_a_site_agrees_to_a_plan_for_itself_only(tmp_path, monkeypatch):
    found = coordinated(tmp_path)
    agreed = job_messages.PlanAgreed("job", "b", found.facts.plan.digest)
    with pytest.raises(PeerRefused):
        found.machine.on_message("a", agreed)
    assert not any(view.agreed for view in found.facts.sites.values())
    found.machine.on_message("b", agreed)
    assert [name for name, view in found.facts.sites.items() if view.agreed] == ["b"]


def test_no_record_that_a_site_sends_lacks_its_sender():
    """Shares have a signed head with the site, which the coordinator's machine checks."""
    assert set(KINDS) - set(OWN) == {messages.Shares}
