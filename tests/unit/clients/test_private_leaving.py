"""In a job with privacy nothing that is made of a site's rows leaves without noise: every field of everything that may
leave is noised, the same whatever the rows are, or absent."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch

import numpy as np
import pytest
from fedcore_clients.leaving import OutgoingList

from fedcore.experiment.prepare import job_for, prepare
from fedcore.secagg.plan import MATRIX, METRIC
from fedcore.secagg.privacy.statement import FIELDS, statement
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import PURPOSES

PRIVATE = {
    "epsilon": 3,
    "max_examples": 320,
    "rounds": 4,
    "protection": "masked",
    "arms": ["federated"],
}


NOT_OF_ROWS = {
    "names, and the declaration of the task": {
        "*.site", "*.job", "Shares.parcels.sender", "Shares.parcels.recipient", "Unmask.answers.of",
        "Grant.recipient", "Grants.grants.site", "Grants.grants.recipient", "KeysErased.wanted", "Survey.shape.*",
        "Hello.tasks.*", "Hello.held.*", "Hello.pins",
    },
    "where the job stands, the same at every site": {
        "*.header", "*.key_id", "*.plan_digest", "*.epoch", "*.certificate", "*.round", "Grants.grants.header",
        "Grants.grants.key_id", "Confirm.bundle", "Confirm.cohort", "Confirm.survivors", "Statement.survivors",
        "Unmask.answers.kind",
    },
    "keys and what is sealed with them, drawn anew": {
        "Keys.channel.*", "Keys.mask.*", "Keys.self_seed_hash", "NextKeys.channel.*", "NextKeys.mask.*",
        "NextKeys.self_seed_hash", "Confirm.next", "Shares.head.*", "Shares.parcels.*",
        "Submit.salt", "Unmask.answers.share", "EpochKey.key.*", "Grant.recipient_key", "Grant.envelope",
        "Grants.grants.recipient_key", "Grants.grants.envelope", "Grants.grants.signature", "*.signature",
    },
    "of the state that released sums lead to, which have noise": {
        "*.state_tag", "Statement.sum_mac", "Statement.state_mac", "CheckpointSealed.digest", "CheckpointSealed.size",
    },
    "of the protected vector, whose size is the plan's": {"Submit.digest", "Submit.size"},
    "one word of a fixed list": {
        "Unable.reason", "Leave.code", "Leave.sealed", "Doing.what", "RosterSeen.word", "Goodbye.code", "Goodbye.text",
    },
    "of the session and the program": {
        "Doing.percent", "Pong.number", "RosterSeen.number", "TrailHead.*", "Hello.software", "Hello.version",
        "Hello.instance",
    },
}  # fmt: skip
"""{why it tells nothing of rows: fields of records and frames}. The words tell that something failed, never what: see
docs/privacy.md for what that leaves."""


JUDGED = {"judge": "released", "patience": 2}


@pytest.mark.parametrize("settings", [{}, JUDGED])
def test_metrics_with_noise_of_their_own_are_the_only_sums_of_test_rows(settings):
    """Released once at the end, or in every round where they are judged: never without noise."""
    task, job = job_for(None, {**PRIVATE, "metric_share": 0.2, **settings})
    found = prepare(task, job)
    plan, site = found.plan, found.federation.sites[0]
    vectors = [each.name for each in OutgoingList(plan, 0, 4).items() if each.kind == "vector"]
    assert vectors == ["update", "metrics"]
    for purpose in vectors:
        step, noised = PlannedRound(purpose, 1), bool(settings) or purpose == "metrics"
        one, other = (site.contribute(plan, step, found.federation.state)[1] for _ in range(2))
        for wide in plan.metric_sums:
            assert (list(one[wide.name]) != list(other[wide.name])) == noised
            assert any(one[wide.name]) == noised
    said = statement(plan, 700)
    assert said["fields"]["metrics"]["is"] == "noised"
    assert said["metrics"]["releases"] == (5 if settings else 1)
    assert said["unit_is"].endswith("or its test rows")


@pytest.fixture(scope="module")
def private():
    task, job = job_for(None, PRIVATE)
    return prepare(task, job)


def half(site):
    """The same site with every second of its training rows."""
    rows = site.site.train
    less = replace(site.site, train=rows.take(np.arange(0, len(rows), 2)))
    return replace(site, site=less)


def said_of(name):
    """The entry of FIELDS for a field of a vector."""
    if name.startswith("coordinates"):
        return FIELDS["update"]
    return FIELDS["metrics" if name.startswith((METRIC, MATRIX)) else name]


def test_every_field_of_every_vector_is_noised_public_or_absent(private):
    plan, step = private.plan, PlannedRound("update", 1)
    items = {each.name: each for each in OutgoingList(plan, 0, 4).items() if each.kind == "vector"}
    assert list(items) == ["update"], "no other purpose has a vector: its sums would have no noise"
    site = private.federation.sites[0]
    whole, less = (
        each.contribute(plan, step, private.federation.state) for each in (site, half(site))
    )
    again = site.contribute(plan, step, private.federation.state)
    fields = {part.name for part in items["update"].parts}
    assert fields == {"coordinates", *whole[1]}
    for name in fields:
        kind, why = said_of(name)
        assert why
        if name == "coordinates":
            assert kind == "noised"
            assert (whole[0] != again[0]).mean() > 0.5, "the same rows give other values each time"
        else:
            assert list(whole[1][name]) == list(less[1][name]), f"{name} tells of the rows"
            assert kind == ("public" if any(whole[1][name]) else "absent")


def test_every_field_of_every_file_record_and_frame_is_known_not_to_be_made_of_rows(private):
    items = [each for each in OutgoingList(private.plan, 0, 4).items() if each.kind != "vector"]
    assert [each.name for each in items if each.kind == "file"] == ["checkpoint"]
    fields = {f"{each.name}.{part.name}" for each in items for part in each.parts}
    patterns = [pattern for known in NOT_OF_ROWS.values() for pattern in known]
    unknown = {field for field in fields if not any(fnmatch(field, each) for each in patterns)}
    assert not unknown, "say in NOT_OF_ROWS why it tells nothing of rows, or take it out"
    assert not [each for each in patterns if not any(fnmatch(field, each) for field in fields)]
    metrics = [each for each in items if each.name in {"PublicMetrics", "ModelMade"}]
    assert not metrics


def test_what_is_refused_or_public_has_no_vector(private):
    plan = private.plan
    for name, (kind, _) in FIELDS.items():
        if name in PURPOSES and kind != "noised":
            assert not len(PURPOSES[name].rounds(plan, 0)), name
    assert plan.standardise == "ranges" and plan.range.start is not None


def test_survey_and_plan_are_the_same_whatever_the_rows_are(private):
    site = private.federation.sites[0]
    assert half(site).shape == site.shape
    assert len({each.shape for each in private.federation.sites}) == 1


def test_statement_lists_these_fields_and_the_prediction_alone_takes_rows(private):
    one, other = statement(private.plan, 700), statement(private.plan, 70)
    assert set(one["fields"]) == set(FIELDS)
    assert {key for key in one if one[key] != other[key]} == {"predicted"}
    # Ten times fewer rows: ten times the noise beside what is learnt.
    ratios = [each["predicted"]["noise_to_signal"] for each in (one, other)]
    assert ratios[1] == pytest.approx(10 * ratios[0])
