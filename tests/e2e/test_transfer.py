"""A vector of several parts that breaks off on its way goes on from where it stood, and is the same.

Where the site itself is new it leaves that round and takes part in the next, with a vector of its own.

One site reaches the coordinator through a TCP proxy that counts bytes, holds them back when so many have
passed, and is cut then; or the coordinator or the site is killed there. What is on the coordinator's disk
is looked at while nothing moves, so no test depends on who is faster.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import socket
import struct
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from deployment import HUB, deployment, small_task

from fedcore.wire.limits import INLINE, PART

BULK = 1_000_000
"""Parameters: an upload of 3.4 MB in four parts, and a sum of 6.8 MB in seven."""

LARGE = f"""
import numpy as np
import torch
import fedcore


def data(source):
    random = np.random.default_rng(source)
    x = random.normal(size=(20, 3)).astype(np.float32)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).astype(np.int64)


class Bulky(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(3, 1)
        self.bulk = torch.nn.Parameter(torch.zeros({BULK}))  # no long dot product: bits are compared

    def forward(self, x):
        return self.line(x) + self.bulk[:: {BULK} // 8].sum()


def model():
    return Bulky()


def loss(outputs, targets):
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


task = fedcore.Task(
    name="large", data=data, model=model, loss=loss, metrics=("accuracy",),
    sites={{"a": 1, "b": 2, "c": 3}},
)
"""

FAR = "b"
"""The site behind the proxy."""

TOLD = """
import fedcore_server.site_api as service
incoming, download = service.chunks.Incoming, service.chunks.download
def Incoming(start, **more):
    print("upload of", more["sender"], "begins at", start.offset, flush=True)
    return incoming(start, **more)
def Download(head, source):
    print("download begins at", head.offset, flush=True)
    return download(head, source)
service.chunks.Incoming, service.chunks.download = Incoming, Download
"""
"""The coordinator says where each transfer begins; what it does is not changed."""

SETTINGS = {"rounds": 1}


class Proxy:
    """A loopback port before the coordinator's. counted: bytes passed on, by direction.

    hold("up", n): nothing moves that way once n bytes have passed, until `go_on`. cut: resets what is open.
    """

    def __init__(self, target):
        self.target, self.counted, self.pairs = target, Counter(), set()
        self._most = {}
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        begun = asyncio.run_coroutine_threadsafe(self._listen(), self.loop)
        self.port = begun.result(10)

    async def _listen(self):
        self.server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def _join(self, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        pair = (writer, far_writer)
        self.pairs.add(pair)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(
                self._pump("up", reader, far_writer), self._pump("down", far_reader, writer)
            )
        self.pairs.discard(pair)
        for each in pair:
            each.close()

    async def _pump(self, way, reader, writer):
        while data := await reader.read(1 << 14):
            while self.counted[way] >= self._most.get(way, self.counted[way] + 1):
                await asyncio.sleep(0.01)
                if writer.is_closing():
                    return
            self.counted[way] += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    def hold(self, way, size):
        self.counted.clear()
        self._most[way] = size

    def go_on(self):
        self._most.clear()

    def wait_held(self, way, seconds=60.0):
        """Until the bytes of `hold` have passed."""
        end = time.monotonic() + seconds
        while self.counted[way] < self._most[way]:
            assert time.monotonic() < end, (self.counted, self._most)
            time.sleep(0.01)

    def wait_read(self, seconds=60.0):
        """Until the site has read everything that has passed: no byte waits in a socket of its."""
        here, end = f":{self.port:04X}", time.monotonic() + seconds
        while True:
            # grpc connects by a socket for both versions of IP, which stands in the second table.
            tables = [Path("/proc/net", name).read_text() for name in ("tcp", "tcp6")]
            rows = [row.split() for table in tables for row in table.splitlines()[1:]]
            open_ = [row for row in rows if row[2].endswith(here) and row[3] == "01"]
            waiting = [row[4].partition(":")[2] for row in open_]
            if waiting and not any(int(size, 16) for size in waiting):
                return
            assert time.monotonic() < end, waiting
            time.sleep(0.01)

    def cut(self):
        def reset():
            for pair in list(self.pairs):
                for writer in pair:
                    found = writer.get_extra_info("socket")
                    with contextlib.suppress(OSError):
                        found.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    writer.transport.abort()

        self.loop.call_soon_threadsafe(reset)

    def close(self):
        async def end():
            self.server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)


@pytest.fixture(scope="module")
def far(tmp_path_factory):
    """(federation, proxy, the model's hash by `simulate`): three sites, one of them behind the proxy."""
    folder = tmp_path_factory.mktemp("transfer")
    limits = {"stage_seconds": 300, "gather_seconds": 60, "minimum_sites": 3}
    with deployment(
        folder, small_task(folder, LARGE), start=(), limits=limits, patches={HUB: TOLD}
    ) as fed:
        proxy = Proxy(fed.port)
        config = fed.config(FAR)
        config.write_text(config.read_text().replace(f':{fed.port}"', f':{proxy.port}"'))
        for name in fed.sites:
            fed.start(name)
        model = fed.simulated(**SETTINGS, arms="federated")
        fed.connected(seconds=90.0)
        yield fed, proxy, model
        proxy.close()


class Job:
    """One job of one round, and what the coordinator said of its transfers."""

    def __init__(self, fed, settings=SETTINGS):
        self.fed = fed
        fed.connected(seconds=90.0)
        self._before = len(fed.log(HUB))
        self.id = fed.submit(**settings)

    def began(self, what):
        """The offsets at which these transfers began, in order."""
        found = re.findall(rf"{what} begins at (\d+)", self.fed.log(HUB)[self._before :])
        return list(map(int, found))

    def part(self, seconds=60.0):
        """The held upload on the coordinator's disk (path, bytes), once it rests: the others are whole."""
        place = self.fed.state(HUB) / "spool" / self.id
        end, found, last = time.monotonic() + seconds, [], None
        while True:
            with contextlib.suppress(FileNotFoundError):  # one that has come whole has another name
                found = [(path, path.stat().st_size) for path in place.rglob("part-*")]
            if len(found) == 1 and found == last and found[0][1]:
                return found[0]
            last = found
            assert time.monotonic() < end, found
            time.sleep(0.3)

    def rows(self, model):
        """The rows of its rounds, once it is finished with the model that `simulate` makes."""
        last = self.fed.wait(self.id, seconds=300)[-1]
        assert (last["state"], last["text"]) == ("finished", ""), last
        assert set(self.fed.released(self.id).values()) == {model}
        path = self.fed.state(HUB) / "jobs" / self.id / "rounds.jsonl"
        return list(map(json.loads, path.read_text().splitlines()))

    def finished(self, model):
        """The row of its one round of training, in which all sites were."""
        rows = self.rows(model)
        assert [row["purpose"] for row in rows] == ["range", "update", "metrics"], rows
        assert all(row["survivors"] == list(self.fed.sites) for row in rows), rows
        return rows[1]


BREAKS = ("cut", "coordinator killed", "coordinator stopped", "site killed")


@pytest.fixture(params=BREAKS)
def broken(request, far):
    """What breaks a transfer off."""
    fed, proxy, _ = far

    def act():
        name = FAR if request.param == "site killed" else HUB
        if request.param != "cut":
            fed.kill(
                name, signal.SIGTERM if request.param == "coordinator stopped" else signal.SIGKILL
            )
        if request.param == "coordinator stopped":
            proxy.go_on()  # its goodbye comes behind what is on its way already
        else:
            proxy.cut()  # and what is on its way with it
        if request.param != "cut":
            fed.processes[name].wait(60.0)
            fed.start_hub() if name == HUB else fed.start(name)
        proxy.go_on()

    act.how = request.param
    return act


def test_an_upload_goes_on_where_it_broke_off(far, broken):
    fed, proxy, model = far
    proxy.hold("up", int(2.5 * PART))
    # Under masks a site that is killed leaves the round: the next test.
    more = {"protection": "encrypted"} if broken.how == "site killed" else {}
    job = Job(fed, SETTINGS | more)
    proxy.wait_held("up")
    _, there = job.part()
    assert there == 2 * PART  # whole parts only
    broken()
    row = job.finished(model)
    began = job.began(f"upload of {FAR}")
    if broken.how == "coordinator stopped":  # in its last seconds more may come, or even all of it
        assert began[0] == 0
        assert min(began[1:], default=there) >= there
    else:
        assert began == [0, there]
    assert row["bytes_up"] > 3 * PART > INLINE
    assert row["bytes_up"] < proxy.counted["up"] < 1.6 * row["bytes_up"]


@pytest.mark.parametrize("broken", BREAKS[-1:], indirect=True)
def test_a_site_that_is_killed_in_its_upload_leaves_the_round(far, broken):
    """Its folder may have been put back: the new process sends nothing more of that vector (PROTOCOL V)."""
    fed, proxy, _ = far
    proxy.hold("up", int(2.5 * PART))
    job = Job(fed, {"rounds": 2})
    proxy.wait_held("up")
    path, there = job.part()
    assert there == 2 * PART
    broken()
    without_it = fed.simulated(rounds=2, drop=[f"1:submit:{FAR}"], arms="federated")
    rows = job.rows(without_it)
    assert [row["purpose"] for row in rows] == ["range", "update", "update", "metrics"], rows
    assert ["abandoned" in row for row in rows] == [False, True, False, False], rows
    assert rows[2]["survivors"] == list(fed.sites)
    assert job.began(f"upload of {FAR}") == [0, 0], "the next round's vector, from its beginning"
    assert not path.exists(), "what had come is of no use"


def test_a_sum_is_read_on_where_it_broke_off(far, broken):
    fed, proxy, model = far
    proxy.hold("down", int(1.5 * PART))
    job = Job(fed)
    proxy.wait_held("down")
    proxy.wait_read()
    time.sleep(0.1)  # from the process's buffers it comes to the job
    broken()
    row = job.finished(model)
    later = [offset for offset in job.began("download") if offset]
    assert row["bytes_down"] > 6 * PART
    if broken.how == "site killed":  # it keeps no part of a sum on its disk
        assert not later
    else:  # with the coordinator gone, another site's may have broken off, too
        # One that stops in an orderly way has seconds left, in which all of it may come.
        assert later or broken.how == "coordinator stopped"
        assert min(later, default=PART) >= PART
        assert row["bytes_down"] < proxy.counted["down"] < 1.6 * row["bytes_down"]


def test_what_came_before_the_break_is_checked_with_the_rest(far):
    """A part that changed on the coordinator's disk meanwhile: the whole is refused and sent anew."""
    fed, proxy, model = far
    proxy.hold("up", int(2.5 * PART))
    job = Job(fed)
    proxy.wait_held("up")
    path, there = job.part()
    proxy.cut()
    with path.open("r+b") as file:
        file.seek(PART // 2)
        byte = file.read(1)[0]
        file.seek(PART // 2)
        file.write(bytes([byte ^ 1]))
    proxy.go_on()
    job.finished(model)
    assert job.began(f"upload of {FAR}")[:3] == [0, there, 0]
