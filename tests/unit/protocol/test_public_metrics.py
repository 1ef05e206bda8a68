"""Metrics that a plan makes public: who may ask for them, what a site says, and when it is believed."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fedcore_server.config import METRICS_FILE, LimitsSection
from fedcore_server.coordinator import Coordinator
from fedcore_server.job_runner import JobRunner
from fedcore_server.operators import prepare
from fedcore_server.operators_api import ROWS_AT_ONCE, OperatorsApi, check_settings
from hypothesis import given
from hypothesis import strategies as st
from support.deployed_jobs import (
    OTHERS,
    PUBLIC,
    ROW,
    SITES,
    VALUES,
    certificate,
    check_refused,
    coordinated,
    loaded,
    offered,
    plan_for,
    released,
    submitted,
    word,
)
from support.job_parts import at

import fedcore
from fedcore.config import Reference, build_job, plan_of
from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    ListRefused,
    MalformedMessage,
    OutOfOrder,
    PlanRefused,
)
from fedcore.results import MetricsRow
from fedcore.secagg.label import Terms, label_of
from fedcore.secagg.plan import (
    METRIC,
    RoundPlan,
    Wide,
    canonical,
)
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.public_metrics import KEPT, Hearing
from fedcore.secagg.protocol.job.site.events import Connected
from fedcore.secagg.protocol.job_messages import PublicMetric, PublicMetrics, told, values_of
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.wire import calls, frames
from fedcore.wire.records import FROM_ANY_SITE, METRICS_RECORD, TO_SITE, pack_record, unpack_record


def hearing(*releases, plan=PUBLIC):
    found = Hearing(plan, "job")
    for each in releases or (certificate(),):
        found.released(each)
    return found


# ------------------------------------------------------------------------------------ the plan


def test_a_plan_without_public_metrics_has_the_digest_it_always_had():
    """Recorded rounds, journals and vectors name it."""
    plain = plan_for()
    assert "public_metrics" not in plain.to_json()
    assert PUBLIC.to_json() == plain.to_json() | {"public_metrics": True}
    assert plain.digest != PUBLIC.digest


def test_a_plan_comes_back_from_its_json():
    for plan in (plan_for(), PUBLIC):
        assert RoundPlan.from_json(json.loads(canonical(plan.to_json()))) == plan


def test_a_job_s_plan_has_what_the_job_says():
    shape = job_messages.ModelShape("t", "0" * 64, 5, 0, 0, "", PUBLIC.metric_sums)
    for asked in (False, True):
        found = build_job({"track": {"public_metrics": asked}, "max_examples": 64})
        assert plan_of(found, shape, SITES, 64).public_metrics is asked


@pytest.mark.parametrize("names", [(), ("x" * 65,), ("a\nb",), ("",), tuple(map(str, range(65)))])
def test_names_that_no_screen_can_show_are_refused(names):
    wides = tuple(Wide(METRIC + name, 2, 8) for name in names)
    assert plan_for(metric_sums=wides).metrics == names
    with pytest.raises(PlanRefused, match=r"track\.public_metrics: found \d+ metrics") as refused:
        plan_for(metric_sums=wides, public_metrics=True)
    assert refused.value.remedy
    most = tuple(Wide(METRIC + f"{k:064d}", 2, 8) for k in range(64))
    assert plan_for(metric_sums=most, public_metrics=True).public_metrics


# ------------------------------------------------------------------- refused under `encrypted`

REFUSED = r"track\.public_metrics: found true under 'encrypted'"


def test_every_way_to_a_plan_refuses_public_metrics_under_encrypted():
    asked = {"protection": "encrypted", "public_metrics": True}
    with pytest.raises(PlanRefused, match=REFUSED) as refused:
        build_job(asked)
    assert "--protection layered" in refused.value.remedy
    with pytest.raises(PlanRefused, match=REFUSED):
        plan_for("encrypted", public_metrics=True)
    with pytest.raises(PlanRefused, match=REFUSED):
        RoundPlan.from_json(plan_for("encrypted").to_json() | {"public_metrics": True})
    with pytest.raises(PlanRefused, match=REFUSED):
        fedcore.simulate("heart", **asked)
    for protection in ("plain", "masked", "layered"):
        assert build_job(asked | {"protection": protection}).track.public_metrics


@pytest.mark.parametrize("verb", ["simulate", "plan", "up"])
def test_commands_refuse_it_with_one_line_and_a_hint(verb, capfd, tmp_path, monkeypatch):
    error = "error: track.public_metrics: found true"
    check_refused(verb, "--public-metrics", "true", error, capfd, tmp_path, monkeypatch)


ENCRYPTED = submitted(track={"public_metrics": True}, protect={"protection": "encrypted"})


def test_submit_and_the_coordinator_refuse_it(tmp_path):
    (tmp_path / "job.toml").write_text("[protect]\nmax_examples = 64\n")
    with pytest.raises(PlanRefused, match=REFUSED):
        prepare(tmp_path, ENCRYPTED, {})
    with pytest.raises(PlanRefused, match=REFUSED):
        check_settings(ENCRYPTED, 4, LimitsSection())
    check_settings(submitted(track={"public_metrics": True}), 4, LimitsSection())


# ----------------------------------------------------------------------------------- at a site


def test_a_site_refuses_it_before_a_row_is_read(tmp_path):
    found = loaded(tmp_path / "1", ENCRYPTED)
    assert found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
    assert found.contributor.loaded == 0
    fine = loaded(tmp_path / "2", submitted(track={"public_metrics": True}))
    assert [type(each) for each in fine.link.said] == [job_messages.SiteSurvey]


def test_a_site_agrees_to_public_metrics_only_where_the_job_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    quiet, public = submitted(), submitted(track={"public_metrics": True})
    for one, other in ((quiet, public), (public, quiet)):
        found = offered(tmp_path / str(one is quiet), one, other)
        assert found.link.said[-1] == job_messages.SiteUnavailable("job", "a", "unable")
        assert found.job.plan is None
    assert "will learn the metrics" not in caplog.text
    found = offered(tmp_path / "both", public, public)
    assert found.job.plan.public_metrics and isinstance(
        found.link.said[-1], job_messages.PlanAgreed
    )
    assert "the coordinator will learn the metrics of each release" in caplog.text


@pytest.mark.parametrize("public", [True, False])
def test_what_a_site_says_of_a_release_is_of_all_sites_and_only_where_the_plan_says(
    tmp_path, public
):
    settings = submitted(track={"public_metrics": public})
    found = offered(tmp_path, settings, settings)
    before = len(found.link.said)
    asyncio.run(released(found))
    said = found.link.said[before:]
    if not public:
        assert said == []
        return
    (message,) = said
    assert (message.site, message.round, message.certificate) == ("a", 7, certificate().hash)
    assert [each.name for each in message.values] == ["bench rows"]
    data = encode(message)
    assert struct.pack(">d", 0.75) in data
    assert not any(struct.pack(">d", value) in data for value in (0.123, 0.456))


@pytest.mark.parametrize(
    ("clipped", "line"),
    [
        (0.973, "round 1: 97.3 % of the coordinates of all sites' updates were beyond the range and clipped"),
        (0.0101, "round 1: 1.01 % of the coordinates"),
        (0.01, ""),
        (0.0, ""),
        (None, ""),
    ],
)  # fmt: skip
def test_what_was_clipped_is_in_the_site_s_record_and_log_and_never_at_the_coordinator(
    tmp_path, caplog, clipped, line
):
    settings = submitted(track={"public_metrics": True})
    found = offered(tmp_path, settings, settings)
    found.contributor.row = replace(ROW, clipped_fraction=clipped, next_range=0.0625)
    before = len(found.link.said)
    asyncio.run(released(found))
    (row,) = map(json.loads, (found.work.context.folder / "jobs/job/rounds.jsonl").open())
    assert row.get("clipped_fraction") == clipped
    said = [text for text in caplog.messages if "clipped" in text]
    assert len(said) == bool(line)
    assert all(line in text and "it is 0.0625 in the next round" in text for text in said)
    (message,) = found.link.said[before:]
    data = encode(message)
    assert b"clipped" not in data
    assert struct.pack(">d", clipped or 0.0625) not in data


def test_a_site_says_it_again_after_a_new_session(tmp_path):
    settings = submitted(track={"public_metrics": True})
    found = offered(tmp_path, settings, settings)

    async def play():
        await found.handle(Connected())
        assert not [m for m in found.link.said if isinstance(m, PublicMetrics)]
        await released(found)
        await found.handle(Connected())

    asyncio.run(play())
    said = [m for m in found.link.said if isinstance(m, PublicMetrics)]
    assert len(said) == 2 and said[0] == said[1]


# ----------------------------------------------------------------------------------- the label


@pytest.mark.parametrize("protection", ["plain", "masked", "layered"])
def test_the_label_says_that_the_coordinator_learns_them(protection):
    quiet, public = (
        Terms.of_plan(plan_for(protection, public_metrics=each)) for each in (False, True)
    )
    before = label_of(quiet).splitlines()
    after = label_of(public, ["age"]).splitlines()
    said = "It learns the metrics of each release over all its sites: the plan makes them public."
    assert after[0] == f"{before[0]} {said}"
    assert len(after) <= 8 and said not in label_of(quiet)
    assert label_of(public).splitlines()[1:] == before[1:]


# ----------------------------------------------------------------------------------- the record


@given(
    st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2)
)
def test_every_finite_float_arrives_as_it_is(values):
    found = dict(zip(VALUES, values, strict=True))
    message = word("a", found)
    assert values_of(PUBLIC, decode(encode(message), PublicMetrics), "a") == found
    assert encode(replace(word("b", found), site="a")) == encode(message)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_site_does_not_say_what_is_not_finite(value):
    with pytest.raises(MalformedMessage, match="this site"):
        word("a", {"auc": value, "accuracy": 0.5})


def test_a_site_says_nothing_under_a_plan_that_keeps_them():
    with pytest.raises(PlanRefused):
        told(plan_for(), certificate(), "a", VALUES)


def test_a_site_says_the_plan_s_names_only():
    for values in ({"auc": 0.5}, {**VALUES, "f1": 0.5}, {"accuracy": 0.5, "auc": 0.5}):
        with pytest.raises(MalformedMessage, match="other names"):
            word("a", values)


def test_the_record_travels_from_sites_only_and_is_short():
    largest = PublicMetrics(
        "j" * 64, "ü" * 64, 1 << 62, "f" * 64,
        tuple(PublicMetric("\U00020000" * 64, bytes(8)) for _ in range(64)),
    )  # fmt: skip
    frame = pack_record("job", largest, FROM_ANY_SITE)
    assert unpack_record(frame, FROM_ANY_SITE, sender="a") == largest
    assert METRICS_RECORD / 2 < len(frame.body) < METRICS_RECORD
    longer = replace(largest, values=largest.values * 2)
    with pytest.raises(MalformedMessage, match=f"at most {METRICS_RECORD} bytes"):
        pack_record("job", longer, FROM_ANY_SITE)
    with pytest.raises(TypeError):
        pack_record("job", largest, TO_SITE)


# ------------------------------------------------------------------------------- being believed


def test_a_value_is_believed_once_the_threshold_says_it():
    found = hearing()
    assert found.take("a", word("a")) == (None, "")
    assert found.take("a", word("a")) == (None, ""), "said twice is said once"
    assert found.take("b", word("b")) == (None, "")
    believed, warning = found.take("c", word("c"))
    assert (believed.metrics, believed.sites, warning) == (VALUES, 4, "")
    assert believed.number == certificate().header.round
    assert found.take("d", word("d")) == (None, ""), "a row once"


def test_the_threshold_is_that_of_the_round():
    """A smaller cohort has its own: t relative to the announced roster (PROTOCOL C)."""
    smaller = certificate(threshold=2)
    found = hearing(smaller)
    assert found.take("a", word("a", of=smaller)) == (None, "")
    assert found.take("b", word("b", of=smaller))[0] is not None


def test_sites_that_differ_are_a_warning_and_show_nothing_of_their_own():
    found = hearing()
    found.take("a", word("a"))
    believed, warning = found.take("d", word("d", OTHERS))
    assert believed is None
    assert warning == (
        "public metrics of round 7: sites differ (a - d); values are shown once 3 say the same"
    )
    assert found.take("b", word("b"))[1].endswith(
        "(a, b - d); values are shown once 3 say the same"
    )
    believed, warning = found.take("c", word("c"))
    assert believed.metrics == VALUES and "a, b, c - d" in warning, (
        "one liar does not hide them either"
    )


def test_two_and_two_show_nothing():
    found = hearing()
    for name, values in (("a", VALUES), ("b", OTHERS), ("c", VALUES), ("d", OTHERS)):
        assert found.take(name, word(name, values))[0] is None


def refuses(found, error, site, message, says):
    with pytest.raises(error, match=says) as refused:
        found.take(site, message)
    assert type(refused.value) is error
    assert refused.value.fault == site
    for name in ("a", "b", "c"):  # and nothing of it was counted
        believed, _ = found.take(name, word(name))
    assert believed is not None


def test_before_the_certificate_nothing_is_taken():
    to_come = certificate(8)
    refuses(hearing(), HeaderRefused, "d", word("d", of=to_come), "not certified here")


def test_of_a_round_without_metric_sums_nothing_is_taken():
    for purpose in ("statistics", "range"):
        other = certificate(8, purpose=purpose)
        refuses(hearing(certificate(), other), HeaderRefused, "d", word("d", of=other), "certified")


def test_under_another_round_s_number_nothing_is_taken():
    refuses(hearing(), HeaderRefused, "d", replace(word("d"), round=8), "not certified here")
    refuses(hearing(), HeaderRefused, "d", replace(word("d"), round=6), "not certified here")


def test_of_a_release_long_ago_it_is_late_and_no_lie():
    old = certificate(3)
    refuses(hearing(), OutOfOrder, "d", word("d", of=old), "those of round 3")
    many = [certificate(n) for n in range(7, 7 + KEPT + 1)]
    found = hearing(*many)
    with pytest.raises(OutOfOrder):
        found.take("a", word("a", of=many[0]))
    assert found.take("a", word("a", of=many[1])) == (None, "")


def test_of_another_job_or_in_another_s_name_nothing_is_taken():
    refuses(hearing(), HeaderRefused, "d", replace(word("d"), job="other"), "another job or site")
    refuses(hearing(), HeaderRefused, "d", word("b"), "another job or site")


def test_who_is_not_in_the_sum_has_no_say():
    three = certificate(survivors=("a", "b", "c"))
    found = hearing(three)
    with pytest.raises(ListRefused, match="not in the sum") as refused:
        found.take("d", word("d", of=three))
    assert refused.value.fault == "d"
    assert found.take("a", word("a", of=three)) == (None, "")
    assert found.take("b", word("b", of=three)) == (None, ""), "the word of d was not counted"
    assert found.take("c", word("c", of=three))[0].sites == 3


def test_a_plan_that_keeps_them_takes_none():
    found = hearing(plan=plan_for())
    with pytest.raises(HeaderRefused, match="the plan keeps them at the sites") as refused:
        found.take("a", word("a"))
    assert refused.value.fault == "a"
    assert found.awaited(certificate(), SITES) == ()


def test_a_second_word_is_the_first_one():
    found = hearing()
    found.take("d", word("d", OTHERS))
    refuses(found, Conflicting, "d", word("d"), "other values than before")


@pytest.mark.parametrize(
    "values",
    [
        (), (PublicMetric("auc", bytes(8)),),
        (PublicMetric("accuracy", bytes(8)), PublicMetric("auc", bytes(8))),
        (PublicMetric("auc", bytes(7)), PublicMetric("accuracy", bytes(8))),
        (PublicMetric("auc", b""), PublicMetric("accuracy", bytes(8))),
        (PublicMetric("auc", struct.pack(">d", math.nan)), PublicMetric("accuracy", bytes(8))),
        (PublicMetric("auc", struct.pack(">d", -math.inf)), PublicMetric("accuracy", bytes(8))),
    ],
)  # fmt: skip
def test_a_malformed_word_is_refused_and_its_sender_named(values):
    refuses(hearing(), MalformedMessage, "d", replace(word("d"), values=values), "public metric")


def test_whose_word_may_still_help_is_awaited_and_nobody_else_s():
    found = hearing()
    assert found.awaited(certificate(), SITES) == list(SITES)
    assert found.awaited(certificate(), "ab") == (), "two can never be three"
    assert found.awaited(certificate(9), SITES) == ()
    found.take("a", word("a"))
    assert found.awaited(certificate(), ("a", "b", "d")) == ["b", "d"]
    found.take("b", word("b", OTHERS))
    assert found.awaited(certificate(), SITES) == ["c", "d"]
    found.take("c", word("c", {"auc": None, "accuracy": None}))
    assert found.awaited(certificate(), SITES) == (), "one and one and one, and one to come"
    known = Hearing(PUBLIC, "job")
    known.released(certificate(), believed=True)
    assert known.awaited(certificate(), SITES) == ()
    for name in SITES:
        assert known.take(name, word(name)) == (None, ""), "it was shown before this process began"


# ------------------------------------------------------------------------------ at a coordinator


def release(found, of):
    """A round of the job ended with this certificate."""
    found.facts.certificate = of
    found.machine.metrics.released()


def hear(found, name, message):
    """The coordinator's job handles a record of this site."""
    asyncio.run(found.handle(events.MessageReceived(name, message)))


def test_a_row_is_in_the_journal_the_file_and_the_next_process(tmp_path, caplog):
    found = coordinated(tmp_path)
    first, second = certificate(), certificate(8, purpose="metrics", training_round=4)
    for each in (first, second):
        release(found, each)
    found.context.journal.put("job", "certificate", encode(second))
    for of, values in ((second, OTHERS), (first, VALUES)):  # the later one is known first
        for name in ("a", "b", "c"):
            hear(found, name, word(name, values, of))
    gap = 0.9 - VALUES["auc"]
    reference = {"metric": "auc", "value": 0.9, "source": "us"}
    rows = [
        {"round": 3, "number": 8, "sites": 4, "metrics": OTHERS,
         "reference": reference | {"gap": 0.9 - 0.99}},
        {"round": 1, "number": 7, "sites": 4, "metrics": VALUES,
         "reference": reference | {"gap": gap}},
    ]  # fmt: skip
    assert [row.to_json() for row in found.facts.metrics.known] == rows
    path = found.directory / METRICS_FILE
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    path.unlink()
    again = JobRunner.stored(found.context, found.links, "job")
    assert again.facts.metrics.known == found.facts.metrics.known
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    for name in SITES:  # said again to the new process
        hear(again, name, word(name, OTHERS, second))
    assert again.facts.metrics.known == found.facts.metrics.known and "WARNING" not in caplog.text


def test_differing_sites_are_a_line_of_the_log_without_values(tmp_path, caplog):
    found = coordinated(tmp_path)
    release(found, certificate())
    for name, values in (("a", VALUES), ("b", OTHERS)):
        hear(found, name, word(name, values))
    assert "job job: public metrics of round 7: sites differ (a - b)" in caplog.text
    assert "0.99" not in caplog.text and found.facts.metrics.known == []
    assert not (found.directory / METRICS_FILE).exists()


def test_what_a_job_is_told_after_its_end_is_kept_too(tmp_path):
    found = coordinated(tmp_path)
    release(found, certificate())
    found.end("finished", "")
    for name in ("a", "b", "c"):
        found.put(events.MessageReceived(name, word(name)))
    assert [row.metrics for row in found.facts.metrics.known] == [VALUES]


def test_the_end_waits_for_sites_that_are_there_and_able(tmp_path):
    found = coordinated(tmp_path, here=SITES)
    assert not found.machine.metrics.may_come(at(here=SITES)), "nothing is released"
    release(found, certificate())
    assert found.machine.metrics.may_come(at(here=SITES))
    found.facts.sites["c"].unable = "unable"
    assert found.machine.metrics.may_come(at(here=SITES))
    found.facts.sites["d"].unable = "unable"
    assert not found.machine.metrics.may_come(at(here=SITES)), "two can never be three"
    for view in found.facts.sites.values():
        view.unable = ""
    for name in ("a", "b", "c"):
        hear(found, name, word(name))
    assert not found.machine.metrics.may_come(at(here=SITES))


def test_a_gap_is_undefined_where_the_metric_is():
    reference = Reference(metric="auc", value=0.9, source="us")
    assert reference.against({"auc": None})["gap"] is None
    assert reference.against({"accuracy": 0.5})["gap"] is None
    assert reference.against({"auc": np.float64(0.5)})["gap"] == 0.4


def test_whoever_watches_a_job_that_is_over_gets_every_row_once(tmp_path):
    found = coordinated(tmp_path)
    rows = [{"round": k, "number": k, "sites": 4, "metrics": VALUES} for k in range(45)]
    found.facts.metrics.known[:] = map(MetricsRow.from_json, rows[::-1])
    found.end("finished", "")

    async def play():
        hub = Coordinator(found.context, SimpleNamespace(still=lambda _: None))
        hub.adopt(found)
        watched = OperatorsApi(hub).watch(
            SimpleNamespace(name="op", fingerprint="f0", serial="1"), frames.WatchRequest("job")
        )
        events = [calls.WATCH.gives.unpack(event, sender="hub") async for event in watched]
        return [frames.json_value(event.json, sender="hub") for event in events]

    events = asyncio.run(play())
    assert [row for event in events for row in event["new_metrics"]] == rows[::-1]
    assert all(len(event["new_metrics"]) <= ROWS_AT_ONCE for event in events)
    assert all(event["metrics"] == rows[-1] for event in events), "the newest model's"
    assert all(event["public_metrics"] is True for event in events)
