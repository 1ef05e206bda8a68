"""Two jobs over the same rows with another site away: the difference of their statistics is one site's.

Attack: everybody follows the rules of each round. In the first job d is away, in the second it is there;
any site subtracts the sums of the first release from those of the second and has the count, the sums and
the sums of squares of d alone. The ledgers of the three refuse the second (PROTOCOL H, across jobs).
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from fedcore_clients.ledger import LEDGER_FILE, read_ledger
from test_cohorts import surveyed
from town import AWAY, SITES, scene

from fedcore.learning.data.statistics import site_sums
from fedcore.secagg.protocol import job_messages as words
from fedcore.secagg.protocol.job.site.events import CheckedSum
from fedcore.secagg.protocol.round import site

THREE = ("a", "b", "c")
RANGES = [(0.0, 100.0), (0.0, 600.0)]


def ran(folder, pool, names, before=None):
    """(opened statistics sums, survivors, words of the sites, keys, text of the end) of one job.

    before: the folder and keys of the job before; the sites kept their ledgers and their identities.
    """
    kept = {"sums": None, "said": [], "keys": None, "end": None}

    async def play(found):
        if before is not None:
            old, keys = before
            found.keys.update(keys)
            found.pins.update({name: key.public for name, key in keys.items()})
            for name in SITES:
                if (old / name / LEDGER_FILE).exists():
                    (found.folder / name).mkdir(parents=True)
                    shutil.copy(old / name / LEDGER_FILE, found.folder / name / LEDGER_FILE)
        kept["keys"] = dict(found.keys)
        for name in names:
            found.start(name)
            surveyed(found, name, observed=True)
            watch(found.sites[name], kept)
        found.start_hub()
        await found.run(seconds=60)
        kept["end"] = found.hub.facts.outcome
        kept["rows"] = found.hub.facts.rounds.known
        kept["unable"] = {name: found.hub.facts.sites[name].unable for name in names}
        kept["log"] = {name: found.sites[name].job.part.last_error for name in names}

    scene(folder, pool, play, limits=AWAY)
    return kept


def watch(job, kept):
    """What any site may keep of a sum it opened."""
    opened = job.work.open_sum

    async def keep(asked):
        found = await opened(asked)
        if asked.header.purpose == "statistics" and isinstance(found, CheckedSum):
            kept["sums"] = found.wides
        return found

    job.work.open_sum = keep


def flat(sums):
    return np.concatenate([np.asarray(sums[name], dtype=np.int64) for name in sorted(sums)])


@pytest.mark.parametrize("control", [False, True], ids=["attack", "control"])
def test_the_difference_of_two_jobs_statistics(tmp_path, pool, without, control):
    first = ran(tmp_path / "1", pool, THREE)
    assert first["rows"][0]["survivors"] == list(THREE)
    (entry,) = [e for e in read_ledger(tmp_path / "1" / "a") if e.purpose == "statistics"]
    assert (entry.survivors, bool(entry.certificate)) == (THREE, True)
    if control:
        without(site, "check_company")
    second = ran(tmp_path / "2", pool, SITES, before=(tmp_path / "1", first["keys"]))
    if not control:
        assert second["sums"] is None, "no second sum was opened"
        assert {second["unable"][name] for name in THREE} == {"policy"}
        assert "policy" in words.REASONS
        assert (
            "exactly a, b, c: such a sum over the same rows was given before" in second["log"]["a"]
        )
        assert not any(row["survivors"] for row in second["rows"]), second["rows"]
        return
    rows = np.random.default_rng(1).uniform(0, 100, (20, 2))
    own = {
        name: values for name, values in site_sums(rows, RANGES).items() if name in first["sums"]
    }
    difference = flat(second["sums"]) - flat(first["sums"])
    assert np.array_equal(difference, flat(own)), json.dumps(second["log"])


def test_the_same_sites_may_give_them_again(tmp_path, pool):
    first = ran(tmp_path / "1", pool, THREE)
    second = ran(tmp_path / "2", pool, THREE, before=(tmp_path / "1", first["keys"]))
    assert second["end"].outcome == "finished" and second["sums"] is not None
    assert np.array_equal(flat(first["sums"]), flat(second["sums"]))
