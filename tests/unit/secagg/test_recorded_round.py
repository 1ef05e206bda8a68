"""The published vectors: the recorded round runs again byte for byte, the independent verifier holds
and notices a change anywhere, and each one-fault vector is refused where it says, as it says."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from support.scripts import load_script

from fedcore import errors
from fedcore.secagg import in_process
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import decode, records, type_name

ROOT = Path(__file__).resolve().parents[3]
VERIFIER = ROOT / "scripts" / "vectors" / "verify.py"
FOLDER = ROOT / "tests" / "vectors"
GOLDEN = json.loads((FOLDER / "masked_round.json").read_text())
NEGATIVE = json.loads((FOLDER / "negative.json").read_text())
STREAM = json.loads((FOLDER / "keystream_round.json").read_text())
ROUNDS = {"masked": GOLDEN, "keystream": STREAM}


generate, verifier = load_script("vectors/generate.py"), load_script("vectors/verify.py")


@cache
def replayed(which="masked"):
    return generate.replay(ROUNDS[which])


# ----------------------------------------------------------------------------- the golden round


@pytest.mark.parametrize("which", ROUNDS)
def test_the_machines_say_the_recorded_bytes_again(which):
    found, golden = replayed(which), ROUNDS[which]
    assert generate.message_list(found) == golden["messages"]
    assert {name: generate.to64(data) for name, data in found.vectors.items()} == golden["vectors"]


@pytest.mark.parametrize("which", ROUNDS)
def test_what_the_machines_hold_is_what_was_recorded(which):
    """Every value in between, the derived secrets, rebuilt masks and keystreams included."""
    found, golden = replayed(which), ROUNDS[which]
    entries = {entry["id"]: entry for entry in golden["sites"]}
    identities = {name: bytes.fromhex(e["identity_seed"]) for name, e in entries.items()}
    recorders = {}
    for name, entry in entries.items():
        draws = [bytes.fromhex(each) for each in entry["draws"]]
        recorders[name] = generate.Recorder(draws)
    group = bytes.fromhex(golden["epoch"]["group_secret"])
    again = generate.transcript_of(found, identities, recorders, group, golden["contributions"])
    for entry in again["sites"]:
        entry["encapsulations"] = entries[entry["id"]]["encapsulations"]
    assert json.loads(json.dumps(again)) == golden


@pytest.mark.parametrize("which", ROUNDS)
def test_all_that_was_drawn_is_used(which):
    for member in replayed(which).members.values():
        assert next(member.entropy.draws, None) is None
        assert next(member.entropy.encapsulations, None) is None


def test_the_golden_files_stay_small():
    """Two rounds, the one-fault messages of one of them, and the list of records."""
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 550_000


# -------------------------------------------------------------------------------- the verifier

ALONE = """
import runpy, sys
for name in ("fedcore", "numpy"):
    sys.modules[name] = None  # importing it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def verify_alone(folder, tmp_path):
    return subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(VERIFIER), str(folder)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip


def test_the_verifier_holds_without_fedcore(tmp_path):
    run = verify_alone(FOLDER, tmp_path)
    assert (run.returncode, run.stderr) == (0, "")
    named = [line.partition(":")[0] for line in run.stdout.splitlines()]
    sections = (*verifier.SECTIONS, ("one fault", None), *verifier.STREAM_SECTIONS)
    assert named == [name for name, _ in sections]


def test_the_verifier_cannot_have_used_fedcore(tmp_path):
    """The control of the test before: where fedcore is wanted, that environment fails."""
    asks = tmp_path / "asks.py"
    asks.write_text("import fedcore\n")
    run = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(asks)], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1 and "ModuleNotFoundError" in run.stderr


@pytest.mark.parametrize(
    ("place", "section"),
    [
        (("vectors", "north"), "vectors"),
        (("messages", 9, "bytes"), "messages"),
        (("sites", 1, "draws", 0), "keys"),
        (("sites", 2, "encapsulations", 1, "ciphertext"), "encapsulations"),
    ],
)
def test_one_flipped_bit_fails_the_command_and_is_named(tmp_path, place, section):
    shutil.copytree(FOLDER, tmp_path / "vectors")
    changed = copy.deepcopy(GOLDEN)
    flip(changed, place)
    (tmp_path / "vectors" / "masked_round.json").write_text(json.dumps(changed))
    run = verify_alone(tmp_path / "vectors", tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith(f"DIFFERS in {section}: ")


def flip(value, place):
    """Change one bit of a byte string, a number by one, a letter of a text."""
    *way, last = place
    for step in way:
        value = value[step]
    old = value[last]
    if isinstance(old, int):
        value[last] = old ^ 1 if abs(old) != 1 else -old
    elif re.fullmatch(r"([0-9a-f]{2}){16,}", old):
        data = bytearray.fromhex(old)
        data[len(data) // 2] ^= 4
        value[last] = data.hex()
    elif len(old) > 500 and re.fullmatch(r"[\w-]+", old):
        data = bytearray(generate.from64(old))
        data[len(data) // 2] ^= 4
        value[last] = generate.to64(bytes(data))
    else:
        middle = len(old) // 2
        value[last] = old[:middle] + chr(ord(old[middle]) ^ 1) + old[middle + 1 :]


def leaves(value, place=()):
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*place, key))
    else:
        yield place


def one_of_each_kind(value):
    """For every path with its list indices and site names left out, the last place it stands for;
    and every draw of one site, since each has a use of its own."""
    names = {entry["id"] for entry in GOLDEN["sites"]}
    kinds = {}
    for place in leaves(value):
        kind = tuple("*" if isinstance(k, int) or k in names else k for k in place)
        kinds[place if place[:3] == ("sites", 0, "draws") else kind] = place
    return list(kinds.values())


@pytest.mark.parametrize("place", one_of_each_kind(GOLDEN), ids=lambda p: ".".join(map(str, p)))
def test_a_flipped_bit_anywhere_is_noticed(place):
    changed = copy.deepcopy(GOLDEN)
    flip(changed, place)
    with pytest.raises(verifier.Differs):
        list(verifier.verify(changed))


@pytest.mark.parametrize("place", one_of_each_kind(STREAM), ids=lambda p: ".".join(map(str, p)))
def test_a_flipped_bit_anywhere_in_the_round_under_keystreams_is_noticed(place):
    changed = copy.deepcopy(STREAM)
    flip(changed, place)
    with pytest.raises(verifier.Differs):
        list(verifier.verify(changed))


@pytest.mark.parametrize("key", ["at", "put", "changes", "unverified", "before", "base"])
def test_a_one_fault_vector_that_lies_about_its_fault_is_noticed(key):
    changed = copy.deepcopy(NEGATIVE)
    entry = next(e for e in changed["vectors"] if e["name"] == "a flipped bit in a keys signature")
    wrong = {"at": entry["at"] + 100, "put": generate.to64(b"\0\0"), "changes": ["keys[1].signature"],
             "unverified": [], "before": 1, "base": 1}  # fmt: skip
    entry[key] = wrong[key]
    with pytest.raises(verifier.Differs, match="one fault"):
        list(verifier.verify(GOLDEN, changed))


# --------------------------------------------------------------------------- one-fault vectors


def recorded(index):
    entry = GOLDEN["messages"][index]
    return generate.from64(entry["bytes"]), records()[entry["kind"]], entry


def arrive(entry, data, kind):
    """Bytes reach the machine at the stage before message `before`: what its shell would do."""
    found = replayed()
    sent = next(s for s in generate.joined(found.tape)[entry["before"]] if s.to == entry["to"])
    assert type_name(type(sent.stage)) == entry["stage"]
    message = decode(data, kind, sender=entry["sender"])
    if entry["to"] != messages.COORDINATOR:
        member = replace(found.members[entry["to"]], entropy=OsEntropy())
        event = site.MessageFromCoordinator(message)
        if kind is messages.Announce:
            event = site.Invited(message, bytes.fromhex(GOLDEN["epoch"]["state_tag"]))
        return sent.stage, site.step(member, sent.stage, event, 0.0)
    event = coordinator.MessageFromSite(entry["sender"], message)
    if kind is messages.Submit:
        vector = found.vectors[entry["sender"]]
        digest = in_process.vector_digest([vector])
        event = coordinator.Uploaded(entry["sender"], message, digest, len(vector))
    return sent.stage, coordinator.step(found.hub.hub, sent.stage, event, 0.0)


@pytest.mark.parametrize("entry", NEGATIVE["vectors"], ids=lambda entry: entry["name"])
def test_each_fault_is_refused_where_it_says(entry):
    base, kind, _ = recorded(entry["base"])
    with pytest.raises(errors.ProtocolRefused) as refusal:
        arrive(entry, generate.patched(base, entry), kind)
    assert type(refusal.value) is getattr(errors, entry["error"])
    assert refusal.value.fault == entry["fault"]


@pytest.mark.parametrize("entry", NEGATIVE["vectors"], ids=lambda entry: entry["name"])
def test_without_the_fault_the_same_stage_goes_on(entry):
    """The control: the recorded message is taken by the very stage that refuses the other."""
    data, kind, message = recorded(entry["before"])
    stage, (after, done) = arrive(entry | {"sender": message["from"]}, data, kind)
    assert after != stage
    assert any(isinstance(effect, effects.Persist) for effect in done)


@pytest.mark.parametrize(
    "entry",
    [e for e in NEGATIVE["vectors"] if e["to"] != "coordinator" and e["stage"] != "Idle"],
    ids=lambda entry: entry["name"],
)
def test_all_that_a_refusal_tells_the_coordinator_is_that_the_site_left(entry):
    base, kind, _ = recorded(entry["base"])
    with pytest.raises(errors.ProtocolRefused) as refusal:
        arrive(entry, generate.patched(base, entry), kind)
    found = replayed()
    sent = next(s for s in generate.joined(found.tape)[entry["before"]] if s.to == entry["to"])
    member = found.members[entry["to"]]
    _, done = site.step(member, sent.stage, site.CheckFailed(refusal.value), 0.0)
    code = messages.RELEASE_REFUSED if entry["stage"] == "Stated" else messages.LEFT
    leave = messages.Leave(found.header.digest, member.id, code)
    assert [e.message for e in done if isinstance(e, effects.Send)] == [leave]


def test_the_one_fault_vectors_are_those_of_this_round():
    """Nobody edits the file by hand: it follows from the recorded round."""
    assert generate.negatives_of(replayed()) == NEGATIVE["vectors"]


def test_both_machines_and_every_stage_that_takes_a_message_have_a_fault():
    covered = {(e["to"] == "coordinator", e["stage"]) for e in NEGATIVE["vectors"]}
    at_sites = {"Idle", "Advertised", "Shared", "Submitted", "Confirmed", "Answered", "Stated"}
    at_hub = {"Advertising", "Sharing", "Collecting", "Confirming", "Unmasking", "Releasing"}
    assert covered == {(False, s) for s in at_sites} | {(True, s) for s in at_hub}
