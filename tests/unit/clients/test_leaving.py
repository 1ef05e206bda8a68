"""What may leave a site: the list that explain prints, the gate that enforces it, and the fields of a policy."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fedcore_clients import job_gate, leaving
from fedcore_clients.channel import Offline
from fedcore_clients.config import read_config
from fedcore_clients.explain import Explained, explain, explained_lines
from fedcore_clients.job_gate import JobGate
from fedcore_clients.leaving import OutgoingList
from fedcore_clients.policy import PolicySection
from fedcore_clients.session import Session
from pydantic import ValidationError
from support.deployed_jobs import certificate, offered, plan_for, submitted
from support.live_sessions import recorded
from support.policies import policy_of

from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.errors import BadInput, PolicyRefused, Refused, UnknownName
from fedcore.files import write_json
from fedcore.identity.authority import Authority
from fedcore.identity.identities import create_identity, write_roster
from fedcore.learning.task import load_task
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import TrainPlan, canonical
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.job_messages import model_upload
from fedcore.secagg.scheme import vector_sizes
from fedcore.store import container
from fedcore.wire.records import TO_COORDINATOR, unpack_record

MASKED_ONLY = {"Keys", "Shares", "Confirm", "Unmask"}


def listed(plan, may=None, features=0):
    found = OutgoingList(plan, features, 4, may)
    return {item.name: item for item in found.items()}


def test_the_list_has_each_vector_with_its_fields_size_and_readers():
    plan = plan_for()
    found = listed(plan)
    vectors = {name for name, item in found.items() if item.kind == "vector"}
    assert vectors == set(vector_sizes(plan, 0)) == {"range", "update", "metrics"}
    update = found["update"]
    size = vector_sizes(plan, 0)["update"]
    assert update.most == size + container.overhead(1 + size // 1024)
    names = [part.name for part in update.parts]
    spec = plan.update_vector
    assert names == ["coordinates", *(wide.name for wide in spec.wides), *spec.marks]
    assert update.parts[1].values == f"0 to {(1 << spec.wides[0].bits) - 1}"
    assert "the sites only, as a sum of at least 3 sites" in update.read_by
    assert "nobody, unless the coordinator and 2 other sites work together" in update.read_by
    assert listed(plan_for(standardise="federated"), features=3)["statistics"].parts


@pytest.mark.parametrize("protection", ["layered", "masked", "encrypted"])
def test_records_travel_under_the_plans_that_need_them_only(protection):
    found = listed(plan_for(protection))
    assert MASKED_ONLY & found.keys() == (MASKED_ONLY if protection != "encrypted" else set())
    assert not {"PublicMetrics", "ModelMade", "model"} & found.keys()
    if protection != "encrypted":
        given = listed(plan_for(protection, public_metrics=True, release="coordinator"))
        assert {"PublicMetrics", "ModelMade", "model"} <= given.keys()
    assert {"Survey", "Unable"} <= {item.name for item in OutgoingList(None, 0, 4).items()}


def test_a_sealed_field_is_read_by_the_site_it_is_for():
    found = listed(plan_for())
    for record, field in (
        ("Shares", "parcels.envelope"),
        ("Grant", "envelope"),
        ("Leave", "sealed"),
    ):
        parts = {part.name: part.read_by for part in found[record].parts}
        assert "cannot open it" in parts.pop(field)
        assert set(parts.values()) == {"the coordinator"}
    doing = {part.name: part for part in found["Doing"].parts}
    assert "training" in doing["what"].values and doing["percent"].values == "0 to 100"


def test_everything_on_the_list_is_explained():
    plan = plan_for(public_metrics=True, release="coordinator")
    for item in listed(plan).values():
        assert item.what and item.read_by and item.most
        assert item.kind != "record" or item.parts, item.name
        assert all(part.type for part in item.parts), item.name


# ------------------------------------------------------------------------------------- the gate


class Sent(Session):
    """A session that is open; what leaves it is kept."""

    def __init__(self, gate):
        super().__init__(None, SimpleNamespace(addresses=[("h", 1)]), None, None, None, gate)
        self.sent = []

    def _put(self, frame):
        self.sent.append(frame)
        for waiting in self._receipts.values():
            waiting.set_result(SimpleNamespace(complete=True))
        return True


@pytest.fixture
def planned(tmp_path):
    """A site's job with a plan, in the round of `certificate()`, and its session."""
    found = offered(tmp_path, submitted(), submitted())
    return found, Sent(JobGate({"job": found}))


def test_what_the_job_says_passes(planned):
    found, link = planned
    for message in found.link.said:
        link.say("job", message)
    assert len(link.sent) == len(found.link.said) == 2


def test_a_record_without_an_entry_is_not_sent_and_logged(planned, monkeypatch, caplog):
    found, link = planned
    without = {name: entry for name, entry in TO_COORDINATOR.items() if name != "PlanAgreed"}
    monkeypatch.setattr(leaving, "TO_COORDINATOR", without)
    with caplog.at_level(logging.ERROR):
        for message in found.link.said:
            link.say("job", message)
    assert len(link.sent) == 1
    (line,) = caplog.messages
    assert "record PlanAgreed: found" in line and "expected nothing of this name to leave" in line
    with pytest.raises(TypeError):  # and one that is in no table cannot be packed at all
        link.say("job", job.JobEnded("job", "finished", ""))


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (job.PublicMetrics("job", "a", 1, "0" * 64, ()), "public metrics"),
        (job.ModelMade("job", "a", "0" * 64, b"d" * 32), "the model"),
        (job.SiteUnavailable("job", "a" * (1 << 19), "policy"), "its length"),
    ],
)
def test_what_the_plan_does_not_give_is_not_sent(planned, caplog, message, why):
    _, link = planned
    gate = link._gate
    with pytest.raises(PolicyRefused, match="about to leave"):
        gate.record("job", message, 1 << 19 if why == "its length" else 100)


def test_what_was_kept_here_is_recorded_and_the_coordinator_is_told_one_word(
    planned, monkeypatch, tmp_path
):
    found, link = planned
    found.link = link
    without = {name: entry for name, entry in TO_COORDINATOR.items() if name != "PlanAgreed"}
    monkeypatch.setattr(leaving, "TO_COORDINATOR", without)
    with AuditTrail.open(tmp_path / "trail", SiteSigner(IdentityKey()), {}) as trail:
        found.context = replace(found.context, audit=trail)
        link.say("job", job.PlanAgreed("job", "a", "0" * 64))
        asyncio.run(found.mailbox.turn(found.handle, lambda: None))
    (kept,) = recorded(tmp_path / "trail", "refused")
    assert (kept["job"], kept["word"]) == ("job", "policy") and "PlanAgreed" in kept["text"]
    (told,) = [unpack_record(frame, TO_COORDINATOR, sender="a") for frame in link.sent]
    assert isinstance(told, job.SiteUnavailable) and told.reason == "policy"


def uploaded(link, header, data):
    asyncio.run(link.upload("job", header, b"d" * 32, data))


def test_a_vector_longer_than_the_plans_is_refused_before_it_leaves(planned, monkeypatch):
    found, link = planned
    header = certificate().header
    monkeypatch.setattr(job_gate, "header_of", lambda stage: header)
    most = found.leaving.most("update", "vector")
    with pytest.raises(
        PolicyRefused, match=rf"vector update: found {most + 1} bytes.*at most {most}"
    ):
        uploaded(link, header.digest, bytes(most + 1))
    assert link.sent == []
    uploaded(link, header.digest, bytes(most))
    assert len(link.sent) == 1, "control"


def test_a_vector_that_the_policy_keeps_here_does_not_leave(planned, monkeypatch):
    found, link = planned
    header = certificate().header
    monkeypatch.setattr(job_gate, "header_of", lambda stage: header)
    found.context.policy.rules = policy_of(fields=["metrics", "range"]).rules
    with pytest.raises(PolicyRefused, match=r"vector update: .* nothing of this name"):
        uploaded(link, header.digest, b"x")
    assert link.sent == []


def test_a_model_or_a_file_of_no_release_does_not_leave(planned):
    found, link = planned
    model = model_upload(found.job.stage.standing.certificate)
    with pytest.raises(PolicyRefused, match=r"file model: .* nothing of this name"):
        uploaded(link, model, b"x")
    with pytest.raises(Offline):
        uploaded(link, b"h" * 32, b"x")
    assert link.sent == []


# ----------------------------------------------------------------------------- fields of a policy


def test_fields_refuse_a_job_that_needs_another_vector(planned):
    found, _ = planned
    refused = policy_of(fields=["update"]).on_offer(found.offer)
    assert "vectors: found 'metrics', expected update only by policy.fields" in str(refused)
    assert policy_of(fields=["update", "metrics"]).on_offer(found.offer) is None
    assert policy_of(fields=["update"]).forbids_all == "fields"
    assert policy_of(fields=[]).forbids_all == "fields"
    assert policy_of(fields=["update", "metrics"]).forbids_all == ""
    with pytest.raises(ValidationError, match="vectors of statistics, range, update, metrics"):
        PolicySection(fields=["updates"])


# ---------------------------------------------------------------------------------- the command


TASK = """
import numpy as np, torch, fedcore
task = fedcore.Task(
    name="small", data=lambda source: (np.ones((20, 3), np.float32), np.arange(20) % 2),
    model=lambda: torch.nn.Linear(3, 1), metrics=("accuracy",), sites={"a": 1, "b": 2, "c": 3},
    loss=lambda out, y: torch.nn.functional.binary_cross_entropy_with_logits(out.squeeze(1), y.float()),
)
"""


@pytest.fixture
def site(tmp_path):
    """A site of three, as its operator has it on disk."""
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    Authority.create("town", now).issue("site", "a", now).save(tmp_path / "kit")
    pins = {"a": create_identity(tmp_path / "identity.pem").public}
    pins |= {name: create_identity(tmp_path / f"{name}.pem").public for name in "bc"}
    write_roster(tmp_path / "roster.toml", pins)
    (tmp_path / "small.py").write_text(TASK)
    digest = load_task("small.py", tmp_path).digest()
    (tmp_path / "site.toml").write_text(
        'site = "a"\ncoordinator = "h:1"\nkit = "kit"\nidentity = "identity.pem"\nfolder = "state"\n'
        f'roster = "roster.toml"\n[tasks.small]\ntask = "small.py"\nsha256 = "{digest}"\nsource = 1\n'
    )
    (tmp_path / "job.toml").write_text(
        'task = "small.py"\n[round]\nrounds = 4\n[protect]\nmax_examples = 64\n'
    )
    return read_config(tmp_path / "site.toml")


def test_a_job_file_a_plan_and_an_offered_job_are_explained_alike(site):
    base = site.base
    found = explain(site, str(base / "job.toml"))
    assert {item.name for item in found.items} >= {"update", "metrics", "Survey", "Doing"}
    text = "\n".join(explained_lines(found))
    assert "  update: 4 in the job, one a round, " in text and "Protects against: " in text
    assert (
        "coordinates: 4 integers of" in text
        and "which cannot open parcels.envelope: sealed for sites" in text
    )
    write_json(base / "plan.json", found.plan.to_json() | {"bytes_up": 1})
    assert explain(site, str(base / "plan.json")).items == found.items
    settings = submitted(round={"rounds": 4})
    recipe = {"job": "j1", "task": "small", "task_sha256": "", "settings": settings}
    folder = site.folder / "states" / "j1"
    folder.mkdir(parents=True)
    write_json(folder / "job.json", recipe | {"sites": ["a", "b", "c", "d"]})
    assert len(explain(site, "j1").plan.sites) == 4
    assert json.loads(canonical(found.to_json()))["sends"][0]["parts"]


@pytest.mark.parametrize(
    ("what", "error"), [("j1", BadInput), ("other.toml", BadInput), ("empty.json", BadInput)]
)
def test_what_cannot_be_explained_is_refused(site, what, error, monkeypatch):
    monkeypatch.chdir(site.base)
    (site.base / "empty.json").write_text("{}")
    with pytest.raises(error) as caught:
        explain(site, what)
    assert "\n" not in str(caught.value)


def test_a_task_that_is_not_allowed_here_is_not_loaded(site):
    narrow = site.model_copy(update={"tasks": {}})
    with pytest.raises(Refused, match=r"found no \[tasks.small\]"):
        explain(narrow, str(site.base / "job.toml"))
    folder = site.folder / "states" / "j1"
    folder.mkdir(parents=True)
    write_json(folder / "job.json", {})
    with pytest.raises(UnknownName, match="j2"):
        explain(site, "j2")


def test_a_second_block_is_on_the_list_and_what_is_kept_is_not():
    plan = plan_for("masked", train=TrainPlan(algorithm="scaffold"), parameters=50_000, threshold=4)
    found = listed(plan)
    blocks = [part for part in found["update"].parts if part.name.startswith("coordinates")]
    assert [part.name for part in blocks] == [
        "coordinates of the update", "coordinates of the change of this site's control variate",
    ]  # fmt: skip
    assert [part.type.split()[0] for part in blocks] == [str(plan.parameters)] * 2
    size = vector_sizes(plan, 0)["update"]
    assert size > 1.7 * vector_sizes(plan_for("masked", parameters=50_000), 0)["update"]
    limits = OutgoingList(plan, 0, 4)
    limits.check("update", "vector", size)
    with pytest.raises(PolicyRefused, match="vector control"):
        limits.check("control", "vector", 1)
    said = "\n".join(explained_lines(Explained(plan, tuple(limits.items()))))
    assert "Kept here from round to round, and never sent: this site's control variate" in said


def test_what_is_frozen_is_said_to_be_neither_trained_nor_sent():
    plan = plan_for("masked", train=TrainPlan(frozen_parameters=("body.*",)))
    found = Explained(plan, tuple(OutgoingList(plan, 0, 4).items()))
    assert found.to_json()["frozen"] == ["body.*"]
    said = [line for line in explained_lines(found) if "body.*" in line]
    assert len(said) == 1 and said[0].startswith("Neither trained nor sent")
