"""Where the bytes of an upload come from: the file of the vector that was just made, without reading it twice."""

import asyncio
from types import SimpleNamespace

import pytest
from fedcore_clients.job_work import JobWork

from fedcore.errors import StoreProblem
from fedcore.store.spool import Spool

HEADER = b"h" * 32


@pytest.fixture
def work(tmp_path):
    """The part of a site's work that knows its vectors: a real spool, and a journal without a small vector."""
    found = JobWork.__new__(JobWork)
    spool = Spool(tmp_path / "spool")
    found.id, found._stored = "job", None
    found.context = SimpleNamespace(spool=spool, journal=SimpleNamespace(get=lambda *_: b""))
    return found


def finished(work, digest):
    return asyncio.run(work.finished_vector(SimpleNamespace(header=HEADER, digest=digest)))


def put(work, byte):
    return work.context.spool.put("job", "vector", [byte * 100_000], header=HEADER)


def test_a_vector_that_this_process_stored_is_not_read_again_before_its_upload(work):
    work._stored = stored = put(work, b"a")
    stored.path.write_bytes(b"damaged since")  # what the coordinator refuses by the digest
    assert finished(work, stored.digest) == stored.path


def test_a_vector_of_an_earlier_process_or_another_round_is_read_and_verified_first(work):
    stored = put(work, b"a")
    assert finished(work, stored.digest) == stored.path
    work._stored = stored
    stored.path.write_bytes(b"damaged since")
    with pytest.raises(StoreProblem, match="damaged"):
        finished(work, b"another".ljust(32))


def test_a_vector_that_is_gone_is_said_to_be_gone(work):
    work._stored = stored = put(work, b"a")
    stored.path.unlink()
    assert finished(work, stored.digest) is None
