"""A new federation as its users make it: founded, joined by four sites, used; a fifth joins; one is revoked mid-run.

Every step is a command in a process of its own, and so are the coordinator and the sites. The coordinator's journal is
in SQLite once, and once on a PostgreSQL server. All secrets that were made are searched for afterwards.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from fedcore_clients.config import read_config
from fedcore_server.config import read_config as coordinators_config
from fedcore_server.federation import ENROLMENT_FOLDER
from support.postgres import PASSWORD
from support.preloaded import preloaded
from support.scripts import load_script
from support.secrets_found import files_below, forms_of, forms_of_key, places, processes_of

from fedcore.audit.receipt import RECEIPTS_FILE
from fedcore.audit.trail import TRAIL_FILE
from fedcore.files.disk import open_to_others
from fedcore.identity.authority_files import open_authority_files
from fedcore.identity.identities import IDENTITY_FILE
from fedcore.identity.join_messages import JoinLine
from fedcore.identity.kit import key_pem, read_key
from fedcore.learning.state import JobState
from fedcore.local_deployment import free_port
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.wire_form import decode
from fedcore.store.journal import Journal

Commands = load_script("demo_deployed.py").Commands

FOUNDERS, LATER, REVOKED = "abcd", "e", "c"
ENCRYPTS = "d"
"""The site that has a keystore, as the coordinator has one."""

ASKS = "a"
"""The site whose operator approves each roster; the policy of the others takes any."""

CONFIG = "--config fed/federation.toml"
PASSPHRASE = "a passphrase of this test only"
ROUNDS, CALLS = 5, 28
"""CALLS: of the loss, after which a site is held: in the middle of the second job's rounds of training."""

TASK = f"""
import time
from pathlib import Path

import numpy as np
import torch

import fedcore

calls, table = 0, None


def data(source):
    global table
    table = Path(source)
    rows = np.loadtxt(table, delimiter=",", dtype=np.float32)
    return rows[:, :3], rows[:, 3].astype(np.int64)


def model():
    return torch.nn.Linear(3, 1)


def loss(outputs, targets):
    held()
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


def held():
    global calls
    hold = table and table.with_suffix(".hold")
    if hold and hold.exists():
        calls += 1
    while calls > {CALLS} and hold.exists():
        table.with_suffix(".held").touch()
        time.sleep(0.05)


task = fedcore.Task(name="small", data=data, model=model, loss=loss, metrics=("accuracy",))
"""
JOB = f"""\
task = "small.py"
[train]
batch_size = 64
[round]
rounds = {ROUNDS}
[protect]
max_examples = 64
"""


@dataclass
class Story:
    """What happened. jobs: the events of each; models: the hash at each site; code, seconds: of the revoked site's
    process; database: its name on the PostgreSQL server, or ""."""

    commands: Commands
    database: str
    secrets: dict = field(default_factory=dict)
    checks: dict = field(default_factory=dict)
    jobs: dict = field(default_factory=dict)
    models: dict = field(default_factory=dict)
    processes: dict = field(default_factory=dict)
    code: int | None = None
    seconds: float = 0.0

    @property
    def folder(self):
        return self.commands.folder

    # ------------------------------------------------------------------------------- in order

    def found(self, postgres):
        """The operator founds the federation and starts its coordinator."""
        (self.folder / "passphrase").touch(0o600)
        (self.folder / "passphrase").write_text(PASSPHRASE)
        self.commands.run(
            f"fed-coordinator init town --out fed --host localhost --port {free_port()} "
            f"--enrol-port {free_port()} --passphrase-file passphrase"
        )
        config = self.folder / "fed" / "federation.toml"
        text = config.read_text() + 'passphrase_file = "../passphrase"\n'
        if self.database:
            url = self.folder / "fed" / "database-url"
            url.touch(0o600)
            url.write_text(postgres.tcp(self.database))
            text = f'database_file = "{url.name}"\n{text}'
        config.write_text(f"{text}{self.keystore('fed')}")
        self.commands.run(f"fed-coordinator keystore encrypt {CONFIG}")
        self.commands.begin("coordinator", f"fed-coordinator serve {CONFIG}", "listening on")

    def keystore(self, home):
        """A passphrase for the keystore of a party, and the table that names it."""
        path = self.folder / f"passphrase-{home}"
        path.touch(0o600)
        path.write_text(f"the passphrase of {home} only")
        self.secrets[f"passphrase of {home}"] = forms_of(path.read_bytes())
        return f'[keystore]\nunlock = "file:../{path.name}"\n'

    def invite(self, site):
        line = self.commands.run(f"fed-coordinator invite {site} {CONFIG}").strip()
        self.secrets[f"token of {site}"] = forms_of(JoinLine.parse(line).token.reveal())
        return line

    def join(self, site, line):
        """The institution joins with its own rows, and looks at what it has."""
        random = np.random.default_rng(ord(site))
        rows = random.normal(size=(40, 3))
        target = rows[:, 0] + 0.5 * rows[:, 1] > 0
        np.savetxt(self.folder / f"{site}.csv", np.column_stack([rows, target]), delimiter=",")
        self.commands.run(
            f"fed-site join --out {site} --task small.py --source {site}.csv", line=f"{line}\n"
        )
        settings, policy = self.folder / site / "site.toml", self.folder / site / "policy.toml"
        settings.write_text(f'sandbox = "none"\n{settings.read_text()}')  # a sandbox takes seconds
        if site == ENCRYPTS:
            settings.write_text(settings.read_text() + self.keystore(site))
            self.commands.run(f"fed-site keystore encrypt --config {site}/site.toml")
        if site != ASKS:
            policy.write_text(f'{policy.read_text()}roster = "any"\n')

    def check(self, site):
        found = json.loads(self.commands.run(f"fed-site check --config {site}/site.toml --json"))
        self.checks[site] = {each["name"]: each["found"] for each in found["checks"]}
        assert found["ok"]

    def take_part(self, site):
        self.commands.begin(site, f"fed-site run --config {site}/site.toml", "connected to")

    def approve(self, number):
        self.commands.until(
            lambda: self.commands.waiting_roster(ASKS) == number, f"roster {number}"
        )
        self.commands.run(f"fed-site roster approve {number} --config {ASKS}/site.toml")

    def submit(self):
        return self.commands.run("fed-coordinator submit job.toml").strip()

    def finish(self, job, sites):
        """Follow a job to its end, here and at its sites."""
        told = self.commands.run(f"fed-coordinator watch {job} --json")
        self.jobs[job] = list(map(json.loads, told.splitlines()))
        rows = {site: {} for site in sites}

        def over():
            rows.update({site: self.commands.job_at(site, job) for site in sites})
            return all(row.get("stage") == "over" for row in rows.values())

        self.commands.until(over, f"{job} over at {sites}")
        self.models[job] = {site: row["model_sha256"] for site, row in rows.items()}

    def revoke(self):
        """Cut a site off while all others wait for its vector."""
        held = self.folder / f"{REVOKED}.held"
        self.commands.until(held.exists, "the site to be held in the middle of its training")
        self.processes = processes_of(str(self.folder))
        self.commands.run(f"fed-coordinator revoke {REVOKED} {CONFIG}")
        began = time.monotonic()
        self.code = self.commands.running[REVOKED].wait(60)
        self.seconds = time.monotonic() - began

    # ------------------------------------------------------------------------------- afterwards

    def rounds(self, number):
        """Survivors of each released round of the first or second job."""
        events = list(self.jobs.values())[number]
        return [row["survivors"] for event in events for row in event["new_rounds"]]

    def find_secrets(self):
        """Add the keys, the passphrases and the secret of the first job's key epoch."""
        fed = self.folder / "fed"
        keys = {
            "TLS key of fed": coordinators_config(fed / "federation.toml").read_kit().key_pem,
            "TLS key of operator": key_pem(read_key(fed / "operator" / "kit" / "key.pem")),
        }
        for site in FOUNDERS + LATER:
            config = read_config(self.folder / site / "site.toml")
            identity = read_key(config.identity, config.password(IDENTITY_FILE))
            keys[f"TLS key of {site}"] = config.read_kit().key_pem
            keys[f"identity of {site}"] = key_pem(identity)
        self.secrets |= {name: forms_of_key(pem.reveal()) for name, pem in keys.items()}
        authority, _ = open_authority_files(
            self.folder / "fed" / "authority", lambda: SecretBytes(PASSPHRASE.encode())
        )
        self.secrets["authority"] = forms_of_key(key_pem(authority.key).reveal())
        self.secrets["passphrase"] = forms_of(PASSPHRASE.encode())
        if self.database:
            self.secrets["password"] = forms_of(PASSWORD.encode())
        first = next(iter(self.jobs))
        with Journal.open(
            self.folder / "a" / "state" / "journal.sqlite", party="site a"
        ) as journal:
            payload = decode(journal.get(first, "epoch"), object).payload.reveal()
        middle = len(payload) // 2
        self.secrets["key epoch"] = forms_of(payload[middle - 16 : middle + 16])
        model = JobState.from_bytes(state_of(self.folder / "a", first).read_bytes())
        self.secrets["model"] = forms_of(model.server.parameters.astype("<f8").tobytes())

    def artefacts(self):
        """Everything that was written, printed, or seen of a process; of an invitation not the line itself."""
        said = {
            f"{number}: {text}": (err if " invite " in text else out + err).encode()
            for number, (text, out, err) in enumerate(self.commands.said)
        }
        return files_below(self.folder) | said | self.processes


def state_of(home, job):
    """The released model at a site."""
    return home / "state" / "states" / job / "current.safetensors"


def values_of(postgres, database):
    """Every value in the tables of a coordinator's database, as bytes."""
    named = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'fedcore'"
    for (table,) in postgres.sql(database, named):
        for row in postgres.sql(database, f'SELECT * FROM fedcore."{table}"'):
            yield from (each if isinstance(each, bytes) else str(each).encode() for each in row)


@pytest.fixture(scope="module", params=["SQLite", "PostgreSQL"])
def story(request, tmp_path_factory):
    postgres = request.getfixturevalue("postgres") if request.param == "PostgreSQL" else None
    folder = tmp_path_factory.mktemp("new")
    python = preloaded().python
    programs = {
        "fed-coordinator": [python, "-P", "-m", "fedcore_server.cli"],
        "fed-site": [python, "-P", "-m", "fedcore_clients.cli"],
    }
    (folder / "tmp").mkdir()
    env = {"TMPDIR": str(folder / "tmp"), "FEDCORE_OPERATOR": "fed/operator/operator.toml"}
    commands = Commands(folder, programs, env)
    told = Story(commands, postgres.database() if postgres else "")
    (folder / "small.py").write_text(TASK)
    (folder / "job.toml").write_text(JOB)
    try:
        told.found(postgres)
        lines = {site: told.invite(site) for site in FOUNDERS}
        for site, line in lines.items():
            told.join(site, line)
        for site in FOUNDERS:
            told.check(site)
            told.take_part(site)
        told.approve(5)
        told.finish(told.submit(), FOUNDERS)

        told.join(LATER, told.invite(LATER))
        told.check(LATER)
        told.take_part(LATER)
        told.approve(6)
        (folder / f"{REVOKED}.hold").touch()
        job = told.submit()
        told.revoke()
        told.finish(job, "abde")
        commands.run(f"fed-coordinator result {job} --out result")
        if postgres:
            (folder / "server.log").write_bytes((postgres.folder / "log").read_bytes())
            (folder / "rows").write_bytes(b"\n".join(values_of(postgres, told.database)))
    finally:
        commands.end()
    told.find_secrets()
    return told


def test_four_sites_join_check_and_train_one_model(story):
    for site in FOUNDERS:
        assert story.checks[site]["data small"].startswith("40 rows")
    assert story.checks["a"]["admitted"].endswith(
        "warning: roster 5 waits: `fed-site run` fetches it, then `fed-site roster approve 5`"
    )
    assert story.checks["b"]["admitted"].endswith(
        "roster 5 at the coordinator: `fed-site run` takes it"
    )
    assert "too few sites so far" in story.checks["b"]["policy"]
    assert story.checks["d"]["admitted"].endswith("roster 5 at both ends")
    (events, _), (models, _) = story.jobs.values(), story.models.values()
    assert events[-1]["state"] == "finished"
    assert len(story.rounds(0)) >= ROUNDS and {*map(tuple, story.rounds(0))} == {tuple("abcd")}
    assert len(set(models.values())) == 1 and None not in models.values()


def test_fifth_site_takes_part_and_a_revoked_one_is_cut_off_while_the_job_goes_on(story):
    (_, events), (_, models) = story.jobs.values(), story.models.values()
    assert (story.code, events[-1]["state"]) == (3, "finished")
    assert story.seconds < 5.0
    rounds = story.rounds(1)
    assert rounds[0] == list("abcde") and rounds[-1] == list("abde")
    assert {*map(tuple, rounds)} == {tuple("abcde"), tuple("abde")}
    assert "revoked" in events[-1]["sites"][REVOKED]["unable"]
    assert "error: " in story.commands.log(REVOKED)
    assert len(set(models.values())) == 1 and None not in models.values()
    assert "Traceback" not in "".join(map(story.commands.log, story.commands.running))


def test_every_trail_is_whole_by_what_the_others_recorded(story):
    """Also by that of the revoked site, which is on no newer roster: the older ones have its key."""
    trails = {site: f"{site}/state/{TRAIL_FILE}" for site in FOUNDERS + LATER}
    trails["coordinator"] = f"fed/state/{TRAIL_FILE}"
    for party in (*FOUNDERS, LATER, "coordinator"):
        others = [path for name, path in trails.items() if name != party]
        where = f"fed-site audit verify --config {party}/site.toml"
        if party == "coordinator":
            where = f"fed-coordinator audit verify {CONFIG}"
            others += [f"{site}/state/{RECEIPTS_FILE}" for site in FOUNDERS + LATER]
        words = " ".join(f"--receipts {path}" for path in others)
        found = json.loads(story.commands.run(f"{where} {words} --json"))
        assert found["whole"] and found["confirmed"] > 5, found


def test_commands_of_the_operator_are_in_the_coordinators_trail(story):
    shown = story.commands.run(f"fed-coordinator audit show {CONFIG} --json")
    lines = [each["facts"] for each in json.loads(shown)["lines"] if each["event"] == "operator"]
    made = [(facts["call"], facts.get("site")) for facts in lines if "user" in facts]
    invited = [("invite", site) for site in FOUNDERS + LATER]
    founded = [("init", None), ("keystore encrypt", None)]
    assert made == [*founded, *invited, ("revoke", REVOKED), ("sign roster", None)]
    assert {facts["call"] for facts in lines if "operator" in facts} == {"submit", "result"}


def test_no_secret_is_anywhere_but_in_its_own_file(story):
    assert len(story.secrets) >= 22
    arguments = b"".join(data for name, data in story.processes.items() if "arguments" in name)
    for name in ("fed/federation.toml", *(f"{site}/site.toml" for site in FOUNDERS + LATER)):
        assert name.encode() in arguments, "the control: its process was looked at"
    found = places(story.secrets, story.artefacts())
    own = {
        "TLS key of fed": {"fed/kit/key.pem"}, "TLS key of operator": {"fed/operator/kit/key.pem"},
        "passphrase": {"passphrase"}, "password": {"fed/database-url"},
        "passphrase of fed": {"passphrase-fed"}, f"passphrase of {ENCRYPTS}": {f"passphrase-{ENCRYPTS}"},
        **{f"TLS key of {site}": {f"{site}/kit/key.pem"} for site in FOUNDERS + LATER},
        **{f"identity of {site}": {f"{site}/identity.pem"} for site in FOUNDERS + LATER},
    }  # fmt: skip
    for name in ("TLS key of fed", f"TLS key of {ENCRYPTS}", f"identity of {ENCRYPTS}"):
        del own[name]  # its file is encrypted
    epoch, model = found.pop("key epoch"), found.pop("model")
    assert epoch and all("/state/journal.sqlite" in place for place in epoch), epoch
    first = next(iter(story.jobs))
    assert (
        str(state_of(Path("a"), first)) in model
        and state_of(story.folder / ENCRYPTS, first).exists()
    )
    assert {place[0] for place in model | epoch} == {"a", "b", "c"}, (
        "every site's that encrypts none"
    )
    assert found == {name: own.get(name, set()) for name in found}
    for place in set().union(*found.values(), epoch, model):
        assert (story.folder / place).stat().st_mode & 0o077 == 0, place


def test_what_the_parties_keep_is_closed_to_other_users(story):
    for home in (story.folder / "fed", *(story.folder / site for site in FOUNDERS + LATER)):
        assert open_to_others(home, ["state", "identity.pem"]) in ([], [home])
        assert (home / "kit").stat().st_mode & 0o077 == 0
    assert (story.folder / "fed" / ENROLMENT_FOLDER).stat().st_mode & 0o077 == 0


def test_search_finds_every_form_of_a_secret_that_is_planted(story):
    for name, forms in story.secrets.items():
        for form in forms:
            assert places({name: forms}, {"planted": b"x" + form + b"\n"}) == {name: {"planted"}}
    token = min(form for form in story.secrets["token of a"] if form.isalnum()).decode()
    with subprocess.Popen(
        [sys.executable, "-c", "input()", token], stdin=subprocess.PIPE,
        env={"MARK": str(story.folder), "PLANTED": token},
    ) as process:  # fmt: skip
        found = places(story.secrets, processes_of(str(story.folder)))
        process.communicate(b"\n")
    number = process.pid
    assert found["token of a"] == {f"arguments of {number}", f"environment of {number}"}
