"""The release ledger of a site: on disk before anything leaves, by a digest of rows that stays at the site."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedcore_clients import ledger as ledgers
from fedcore_clients.ledger import LEDGER_FILE, Exposure, Ledger, ledger_lines, read_ledger
from support.deployed_jobs import certificate, loaded, offered, site_job, submitted
from support.full_disk import no_file_beyond
from support.policies import begin, policy_of
from torch.utils.data import TensorDataset

from fedcore.config import build_job
from fedcore.errors import PolicyRefused, StoreFull, StoreProblem
from fedcore.learning.data.rows import ArrayRows, DatasetRows, rows_digest
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.site import SiteTrainer
from fedcore.learning.task import load_task
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.site.participation import RowsInSum

TASK = load_task("heart")
ROWS, MORE = "a" * 64, "b" * 64
NOW = 2_000_000_000.0


def entry(name="h1", **changes):
    values = {
        "header": name, "rows": ROWS, "purpose": "update", "job": "j1", "plan": "p", "round": 3,
        "training_round": 2, "cohort": ("a", "b", "c", "d"), "survivors": ("a", "b", "c"),
        "columns": (), "at": NOW,
    }  # fmt: skip
    return Exposure(**values | changes)


@pytest.fixture
def found(tmp_path):
    with Ledger.open(tmp_path, IdentityKey()) as opened:
        yield opened


# ------------------------------------------------------------------------------------- on disk


def test_an_entry_is_synced_before_it_is_known(tmp_path, found, stand_in):
    """The answer leaves after `exposed` returned (PROTOCOL D)."""
    happened, sync, write = [], os.fdatasync, os.pwrite
    stand_in(os, pwrite=lambda *a: (happened.append("write"), write(*a))[1])
    stand_in(os, fdatasync=lambda h: (happened.append("sync"), sync(h))[1])
    found.exposed(entry())
    assert happened == ["write", "sync"]
    assert read_ledger(tmp_path) == [entry()], "another process sees it"


def test_a_round_has_one_entry_and_learns_what_comes_later(tmp_path, found):
    found.exposed(entry(survivors=()))
    found.exposed(entry(at=NOW + 5))
    found.certified("h1", "c" * 64)
    found.certified("h1", "d" * 64)
    found.certified("h2", "c" * 64)
    found.exposed(entry("h2", survivors=("x",)))
    found.exposed(entry("h2", survivors=("y",)))
    expected = [entry(certificate="c" * 64), entry("h2", survivors=("x",))]
    assert list(found) == expected and read_ledger(tmp_path) == expected


def test_a_new_process_finds_all_of_it(tmp_path):
    key = IdentityKey()
    with Ledger.open(tmp_path, key) as first:
        first.exposed(entry())
        first.certified("h1", "c" * 64)
        rows = first.rows_key(MORE)
    with Ledger.open(tmp_path, key) as second:
        assert list(second) == [entry(certificate="c" * 64)] and second.rows_key(MORE) == rows
        second.exposed(entry("h2"))
    assert len(read_ledger(tmp_path)) == 2
    assert stat.S_IMODE((tmp_path / LEDGER_FILE).stat().st_mode) == 0o600


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_line_that_a_crash_cut_off_is_removed(tmp_path, cut):
    path = tmp_path / LEDGER_FILE
    with Ledger.open(tmp_path, IdentityKey()) as first:
        first.exposed(entry())
        whole = path.read_bytes()
        first.exposed(entry("h2"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_ledger(tmp_path) == [entry()]
    with Ledger.open(tmp_path, IdentityKey()) as second:
        assert path.read_bytes() == whole
        second.exposed(entry("h3"))
    assert [each.header for each in read_ledger(tmp_path)] == ["h1", "h3"]


@pytest.mark.parametrize("line", [b"{}\n", b"[]\n", b"x\n", b'{"exposed": {}}\n'])
def test_a_damaged_ledger_is_refused(tmp_path, line):
    path = tmp_path / LEDGER_FILE
    with Ledger.open(tmp_path, IdentityKey()) as first:
        first.exposed(entry())
    path.write_bytes(line + path.read_bytes())
    with pytest.raises(StoreProblem, match="found line 1 damaged") as refused:
        Ledger.open(tmp_path, IdentityKey())
    assert "backup" in refused.value.remedy


def test_a_full_disk_leaves_whole_lines(tmp_path, found):
    found.exposed(entry())
    size = (tmp_path / LEDGER_FILE).stat().st_size
    with pytest.raises(StoreFull), no_file_beyond(size + 20):
        found.exposed(entry("h2"))
    assert not found.has("h2")
    found.exposed(entry("h3"))
    assert [each.header for each in read_ledger(tmp_path)] == ["h1", "h3"]


def test_it_prints_what_was_released(tmp_path, found):
    assert list(ledger_lines(read_ledger(tmp_path))) == ["nothing was released of this site's rows"]
    found.exposed(entry())
    found.exposed(entry("h2", survivors=(), purpose="statistics"))
    found.certified("h1", "c" * 64)
    one, two = ledger_lines(found)
    assert "update (round 2)  job j1, number 3" in one and "sites a, b, c  certificate cccc" in one
    assert "not known, of a, b, c, d  without a certificate" in two


# ------------------------------------------------------------------------------ what follows from it


def test_jobs_are_counted_by_rows_and_for_30_days(found):
    for number, changes in enumerate(
        [{}, {"job": "j2"}, {"job": "j2"}, {"job": "j3", "rows": MORE}, {"job": "j4", "at": NOW - 31 * 86400}]
    ):  # fmt: skip
        found.exposed(entry(f"h{number}", **changes))
    assert found.jobs_over(ROWS, NOW + 60) == {"j1", "j2"}
    assert found.jobs_over(MORE, NOW + 60) == {"j3"}
    assert found.jobs_over(ROWS, NOW + 30 * 86400) == set()


def test_statistics_go_with_the_sites_that_had_them(found):
    about = {"purpose": "statistics", "columns": ("age", "chol")}
    assert found.statistics_only_with(ROWS, ["age"]) is None
    found.exposed(entry(survivors=("c", "a", "b"), **about))
    assert found.statistics_only_with(ROWS, ["chol", "x"]) == ("a", "b", "c")
    assert found.statistics_only_with(ROWS, ["x"]) is None, "no column in common"
    assert found.statistics_only_with(MORE, ["age"]) is None, "other rows"
    assert found.statistics_only_with(ROWS, ["age"], besides="h1") is None, "this very round"
    found.exposed(entry("h2", job="j2", survivors=(), **about))
    assert found.statistics_only_with(ROWS, ["age"]) == (), "two sets: none"
    assert found.statistics_only_with(ROWS, ["age"], besides="h1") == ("a", "b", "c", "d")


def test_a_policy_counts_other_jobs_and_lets_one_that_began_go_on():
    policy = policy_of(4, jobs_per_month=2)
    assert policy.on_release(RowsInSum("j9", {"j1"})) is None
    refused = policy.on_release(RowsInSum("j9", {"j1", "j2"}))
    assert refused.word == "policy" and "policy.jobs_per_month" in str(refused)
    assert policy.on_release(RowsInSum("j2", {"j1", "j2", "j3"})) is None
    lenient = policy_of(4, jobs_per_month=2, jobs="any")
    assert lenient.on_release(RowsInSum("j9", {"j1", "j2"})) is None


def spent(folder, limit, jobs):
    """A site whose ledger has these jobs over the rows it will load, and a limit of jobs a month."""
    found = site_job(folder, submitted(), jobs_per_month=limit)
    rows = found.context.ledger.rows_key("0" * 64)
    now = ledgers.time.time()
    for name in jobs:
        found.context.ledger.exposed(entry(name, rows=rows, job=name, at=now))
    return found


async def load(found):
    await begin(found)
    return found


def test_a_job_too_many_over_the_same_rows_is_refused(tmp_path, caplog):
    found = asyncio.run(load(spent(tmp_path / "1", 2, ["j1", "j2"])))
    assert (
        found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
        and found.job.part.survey is None
    )
    assert "found 2 others over the same rows in 30 days" in caplog.text
    fine = asyncio.run(load(spent(tmp_path / "2", 2, ["j1"])))
    assert [type(each) for each in fine.link.said] == [job_messages.SiteSurvey]


def test_of_jobs_offered_at_once_no_more_than_allowed_are_given_a_sum(tmp_path):
    """All were loaded before any had a sum; the count is made again where one would leave."""
    found, header = (
        offered(tmp_path, submitted(), submitted(), jobs_per_month=1),
        certificate().header,
    )
    found.context.ledger.exposed(
        entry("h9", rows=found.job.part.rows, job="j9", at=ledgers.time.time())
    )
    with pytest.raises(PolicyRefused, match="jobs_per_month"):
        found.job.parts.rounds.exposed(header, ("a", "b", "c"))
    assert not found.context.ledger.has(header.digest.hex())


# ----------------------------------------------------------------------------- the digest of rows


def arrays(x, y):
    return ArrayRows(torch.tensor(x), torch.tensor(y))


def test_the_digest_is_of_the_rows_and_not_of_their_order_or_parts():
    rows = arrays([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], [0, 1, 0])
    whole = rows_digest(rows)
    assert whole == rows_digest(rows.take(np.array([2, 1, 0])), None)
    assert whole == rows_digest(rows.take(np.array([1])), rows.take(np.array([0, 2])))
    others = [
        arrays([[1.0, 2.0], [3.0, 4.0]], [0, 1]), arrays([[1.0, 2.0], [3.0, 4.0], [1.0, 2.5]], [0, 1, 0]),
        arrays([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0]], [0, 1, 1]),
        arrays([[1.0], [3.0], [1.0]], [0, 1, 0]),
    ]  # fmt: skip
    assert len({whole, *map(rows_digest, others)}) == 5


def test_the_digest_of_a_table_is_the_same_in_every_job(tmp_path):
    """Other folds, seeds and caps: the same rows; and it is in every load of the training process."""
    source = dict(TASK.sites)["va"]
    digests = set()
    for settings in ({}, {"fold": 3}, {"seed": 9}, {"rounds": 2, "epochs": 3}):
        job_ = build_job(TASK.defaults, settings)
        digests.add(SiteTrainer.load(TASK, job_, "va", source, 4096, FoldSplit()).rows)
    assert len(digests) == 1
    other = SiteTrainer.load(
        TASK, build_job(TASK.defaults), "va", dict(TASK.sites)["hungary"], 4096, FoldSplit()
    ).rows
    assert other not in digests
    found = loaded(tmp_path, submitted())
    assert found.job.part.rows == found.context.ledger.rows_key("0" * 64)


def test_missing_values_and_zeros_have_one_form():
    from fedcore.learning.data.rows import RowLayout, TableRows

    layout = RowLayout(("age",), ((0.0, 1.0),), (False,))
    fixed, y = np.zeros((2, 0), dtype=np.float32), torch.zeros(2, dtype=torch.int64)
    odd = np.array([[-0.0], [np.uint64(0x7FF8000000000001).view(np.float64)]])
    plain = np.array([[0.0], [np.nan]])
    assert rows_digest(TableRows(odd, fixed, y, layout)) == rows_digest(
        TableRows(plain, fixed, y, layout)
    )


class Drawing(TensorDataset):
    """Other values at every reading, as a random transform gives; the labels stay."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.rand(()), y


def test_a_dataset_goes_by_its_items_or_where_these_are_drawn_by_its_labels():
    x, y = torch.zeros(4, 2), torch.tensor([0, 1, 1, 0])
    one = rows_digest(DatasetRows(TensorDataset(x, y)))
    assert one == rows_digest(DatasetRows(TensorDataset(x, y[[1, 0, 3, 2]])))
    assert one != rows_digest(DatasetRows(TensorDataset(x + 1, y)))
    drawn = rows_digest(DatasetRows(Drawing(x, y)))
    assert drawn == rows_digest(DatasetRows(Drawing(x + 1, y)))
    assert drawn != rows_digest(DatasetRows(Drawing(x, y[[0, 0, 1, 0]])))


def test_what_the_ledger_keeps_is_keyed_by_the_identity(tmp_path):
    one, two = IdentityKey(b"1" * 32), IdentityKey(b"2" * 32)
    keyed = set()
    for name, key in (("1", one), ("2", two), ("3", one)):
        with Ledger.open(tmp_path / name, key) as found:
            rows = found.rows_key(MORE)
            found.exposed(entry(rows=rows))
            keyed.add(rows)
            assert MORE not in (tmp_path / name / LEDGER_FILE).read_text()
    assert len(keyed) == 2 and MORE not in keyed


def test_json_is_what_the_command_prints():
    assert json.loads(json.dumps(entry().to_json())) == replace(entry()).to_json() | {
        "cohort": ["a", "b", "c", "d"], "survivors": ["a", "b", "c"], "columns": [], "keys": [],
    }  # fmt: skip
