"""Patients stay at home: whatever a task raises, prints or dies of at a site, only that site's log has it.

One site's task fails in every place where a task runs, with a name that must not travel. The
coordinator's process writes down every frame it receives and sends; then its folder, its log, those
frames and the other sites' folders and logs are searched for the name, in each form a text may take.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import os
import re
import threading
from pathlib import Path

import pytest
from deployment import HUB, deployment, small_task

from fedcore.secagg.protocol.job_messages import REASONS, UNABLE

NAME = "PATIENT-7419"

TASK = f'''
import os
import signal
import sys

import numpy as np
import torch

import fedcore

CALLS = []


def trouble(where):
    """At the site whose process has the variable, if this is the place of the day."""
    place = os.environ.get("PLACE_FILE")
    if place is None or open(place).read() != where:
        return
    print("{NAME} came in on stdout", flush=True)
    print("{NAME} came in on stderr", file=sys.stderr, flush=True)
    if where == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if where == "exits":
        sys.exit("{NAME}")
    raise ValueError("{NAME}")


def data(source):
    CALLS.clear()
    trouble("data")
    random = np.random.default_rng(source)
    x = random.normal(size=(40, 3)).astype(np.float32)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).astype(np.int64)


def model():
    trouble("model")
    return torch.nn.Linear(3, 1)


def loss(outputs, targets):
    if outputs.requires_grad:  # training: two batches a round
        CALLS.append(1)
        if len(CALLS) > 2:
            for where in ("round 2", "killed", "exits"):
                trouble(where)
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


def evaluate(model, rows):
    if CALLS:  # it is tried once when the task is loaded, before any training
        trouble("evaluate")
    with torch.no_grad():
        right = ((model(rows.x).squeeze(1) > 0) == (rows.y > 0)).sum()
    return {{"accuracy": (float(right), len(rows.y))}}


task = fedcore.Task(
    name="small", data=data, model=model, loss=loss, evaluate=evaluate, metrics=("accuracy",),
    sites={{"a": 1, "b": 2, "c": 3, "d": 4}}, defaults={{"batch_size": 16}},
)
'''

RECORDER = """
import os, threading
from fedcore.wire.codec import Codec
kept, busy = open(os.environ["FRAMES"], "ab", buffering=0), threading.Lock()
pack = Codec.pack
def recorded(unpack):
    def received(self, data, *, sender):
        with busy:
            kept.write(b"<<" + data)
        return unpack(self, data, sender=sender)
    return received
def sent(self, frame):
    data = pack(self, frame)
    with busy:
        kept.write(b">>" + data)
    return data
Codec.unpack, Codec.unpack_each = recorded(Codec.unpack), recorded(Codec.unpack_each)
Codec.pack = sent
"""

PLACES = ("data", "model", "round 2", "evaluate", "killed", "exits")
"""Where a task fails: one word leaves the site, whatever it was."""


def forms(name=NAME):
    """A name as bytes, in the ways it could be hidden in a file or a frame."""
    text = name.encode()
    found = {text, text.lower(), name.encode("utf-16-le"), text.hex().encode(), text[::-1]}
    for at in range(3):  # base64 depends on where the name begins
        whole = base64.b64encode(bytes(at) + text)
        found.add(whole[4 : len(whole) - 4] if at else whole[:-4])
    return found


def holders(folder, found=None):
    """Files below a folder that have the name, in any of its forms. Who runs may remove some meanwhile."""
    having = []
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            with contextlib.suppress(FileNotFoundError):
                if any(form in path.read_bytes() for form in found or forms()):
                    having.append(path)
    return sorted(having)


def test_forms_are_found(tmp_path):
    """A search that finds nothing must be able to find something."""
    for number, form in enumerate(forms()):
        (tmp_path / str(number)).write_bytes(b"x" * 7 + form + b"y" * 9)
    (tmp_path / "innocent").write_bytes(b"PATIENT 7419")
    assert len(holders(tmp_path)) == len(forms())
    for at in range(3):
        (tmp_path / "base64").write_bytes(
            base64.b64encode(b"z" * (30 + at) + NAME.encode() + b" 12")
        )
        assert tmp_path / "base64" in holders(tmp_path)


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    place, wire = folder / "place", folder / "frames"
    place.write_text("nowhere")
    wire.touch()
    at_b = f"import os\nos.environ['PLACE_FILE'] = {str(place)!r}\n"
    with deployment(
        folder, small_task(folder, TASK), patches={HUB: RECORDER, "b": at_b},
        env={"FRAMES": str(wire)},
    ) as found:  # fmt: skip
        found.place, found.wire = place, wire
        found.connected()
        yield found


@pytest.mark.parametrize("where", PLACES)
def test_a_failing_task_tells_a_word_and_the_others_go_on(fed, where):
    fed.place.write_text(where)
    before, heard = len(fed.log("b")), len(fed.log(HUB))
    job = fed.submit(rounds=3)
    events = fed.wait(job)

    assert events[-1]["state"] == "finished", (events[-1], fed.log(HUB)[-2000:])
    rounds = [row for event in events for row in event["new_rounds"] if row["purpose"] == "update"]
    assert len(rounds) == 3
    assert {"a", "c", "d"} <= set(rounds[-1]["survivors"])
    # killed, it is back in the next round with a new process, whose first two batches pass
    assert where == "evaluate" or any("b" not in row["survivors"] for row in rounds)
    assert fed.released(job, sites=["a", "c", "d"])
    told = re.findall(r"site b: (.*?)\"", fed.log(HUB)[heard:])
    assert set(told) == {REASONS[UNABLE]}

    said = fed.log("b")[before:]
    assert f"{NAME} came in on stdout" in said
    assert f"{NAME} came in on stderr" in said
    if where not in {"killed", "exits"}:
        assert "Traceback" in said
        assert f"ValueError: {NAME}" in said
    assert fed.processes["b"].poll() is None, "the site's process goes on"
    assert UNABLE.encode() in fed.wire.read_bytes(), "the recorder saw the word that left"
    fed.over(job)
    nowhere_else(fed)


def nowhere_else(fed):
    """The name is in the log of site b and in no other file of the federation, nor on the wire."""
    assert holders(fed.folder) == [fed.folder / "b.log"]
    frames = fed.wire.read_bytes()
    assert frames.count(b"<<") > 20
    assert frames.count(b">>") > 20
    assert not [form for form in forms() if form in frames]


def test_what_operators_are_told_has_no_text_of_a_site(fed):
    """While a site fails, round after round, an operator asks for everything again and again."""
    fed.place.write_text("evaluate")
    heard, over = [], threading.Event()

    def ask():
        while not over.wait(0.05):
            heard.append(repr(fed.jobs()))

    listener = threading.Thread(target=ask)
    listener.start()
    try:
        job = fed.submit(rounds=2)
        heard.extend(repr(event) for event in fed.wait(job))
    finally:
        over.set()
        listener.join()
    assert len(heard) > 5
    assert any(f"'{UNABLE}'" in each for each in heard)
    assert not [e for e, form in itertools.product(heard, forms()) if form in e.encode()]
    fed.over(job)
    nowhere_else(fed)
