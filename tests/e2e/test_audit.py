"""What the audit trails of a whole job have, and what they never have."""

import base64
import json

import pytest
from town import HUB, SITES, scene

from fedcore.audit.keys import site_key
from fedcore.audit.trail import TRAIL_FILE
from fedcore.audit.verification import verify
from fedcore.secagg.protocol.wire_form import decode

A_ROUND = [
    "sent Keys", "sent Shares", "sent Submit", "sent vector", "sent Confirm",
    "sent NextKeys", "exposed", "sent Unmask", "sent Statement", "released",
]  # fmt: skip
"""What a site records in a round without absences."""


@pytest.fixture(scope="module")
def played(tmp_path_factory, pool):
    """The town after a masked job of two rounds, and {party: lines}."""
    folder, kept = tmp_path_factory.mktemp("audit"), {}

    async def play(town):
        town.secrets = set()
        await town.first_round()
        for name in SITES:
            payload = decode(town.journals[name].get("job", "epoch"), object).payload.reveal()
            town.secrets |= {payload[at : at + 16] for at in range(0, len(payload) - 15, 16)}
        await town.run()
        await town.check()
        town.model = town.sites["a"].job.state.model_sha256
        kept["town"] = town

    scene(folder, pool, play)
    town, lines = kept["town"], {}
    for name in (HUB, *SITES):
        key = town.keys.get(name, town.hub_key)
        verdict = verify((folder / name / TRAIL_FILE).read_bytes(), {site_key(key.public)})
        assert verdict.findings == ()
        lines[name] = verdict.lines
    return town, lines


def named(line):
    return f"sent {line.facts['what']}" if line.event == "sent" else line.event


@pytest.mark.parametrize("site", SITES)
def test_site_records_all_that_leaves_in_every_round(played, site):
    rounds = {}
    for line in played[1][site]:
        if "number" in line.facts:
            rounds.setdefault(line.facts["number"], []).append(named(line))
    assert rounds == {1: A_ROUND, 2: A_ROUND, 3: A_ROUND}


def test_site_records_its_decisions_keys_and_the_end(played):
    lines = [line for line in played[1]["a"] if line.event in ("decision", "key", "ended")]
    assert [(line.event, line.facts.get("on"), line.facts.get("word")) for line in lines] == [
        ("decision", "offer", "accepted"), ("decision", "plan", "agreed"), ("key", None, "held"),
        ("ended", None, None),
    ]  # fmt: skip
    assert lines[-1].facts["outcome"] == "finished"


def test_line_of_a_vector_names_what_was_uploaded_and_from_which_model(played):
    town, lines = played
    sizes = set()
    for name in SITES:
        vectors = [line.facts for line in lines[name] if line.facts.get("what") == "vector"]
        agreed = next(line.facts["plan"] for line in lines[name] if "plan" in line.facts)
        assert [each["purpose"] for each in vectors] == ["update", "update", "metrics"]
        assert {each["plan"] for each in vectors} == {agreed}
        assert all(len(each["sha256"]) == 64 for each in vectors)
        sizes.add(tuple(each["bytes"] for each in vectors))
        assert vectors[-1]["model"] == town.model, "the last one measures the last model"
    ((update, again, metrics),) = sizes  # of every site: they follow from the plan
    assert update == again > metrics > 0
    starts = {[line for line in lines[n] if "model" in line.facts][1].facts["model"] for n in SITES}
    assert len(starts) == 1, "all sites start from one model"


def test_both_sides_name_the_same_releases(played):
    releases = {
        name: [line.facts["certificate_hash"] for line in found if line.event == "released"]
        for name, found in played[1].items()
    }
    assert len(releases[HUB]) == 3
    assert set(map(tuple, releases.values())) == {tuple(releases[HUB])}


def test_no_key_no_share_and_no_value_is_in_a_trail(played):
    town, _ = played
    whole = b"".join((town.folder / name / TRAIL_FILE).read_bytes() for name in (HUB, *SITES))
    keys = [town.hub_key, *town.keys.values()]
    secrets = town.secrets | {key._key.private_bytes_raw() for key in keys}
    assert len(secrets) > len(keys)
    for secret in secrets:
        forms = (secret, secret.hex().encode(), base64.b64encode(secret)[:-4])
        assert not any(form in whole for form in forms)
    for line in whole.splitlines():
        facts = json.loads(line)["facts"]
        assert not any(isinstance(value, float) for value in facts.values())
        assert not facts.keys() & {"rows", "count", "examples", "weight", "value", "share", "token"}


def test_lines_and_bytes_of_a_round_are_few(played):
    found = [line for line in played[1]["a"] if line.facts.get("number") == 2]
    assert len(found) <= 10
    assert sum(len(line.to_bytes()) for line in found) < 6000
