"""fed-site: the process of one institution, and the commands of its operator.

Results go to stdout, progress and hints to stderr; exit codes are those of every command
(`fedcore/errors.py`). grpc, torch and pydantic are imported inside commands, so `--help` answers at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.cli.audit_commands import TrailPlace, audit_commands
from fedcore.cli.console import application, echo, emit, run, say, start_logging
from fedcore.errors import EXIT_REFUSED, BadInput

if TYPE_CHECKING:  # they import numpy, which `--help` does without
    from fedcore_clients.control import Control

    from fedcore.identity.join_messages import JoinAnswer, JoinLine
    from fedcore.identity.proxies import ProxySection
    from fedcore.types import Json

app = application("fed-site", "A site of a federation: its process, and what it is at.")

Config = Annotated[Path, typer.Option("--config", help="The site's file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_HERE = Path("site.toml")

ASK_SECONDS = 5.0
"""How often `join --wait` asks whether it is approved."""


def _print(as_json: bool, found: Json, lines: Iterable[str]) -> None:
    """Print a result on stdout, as one JSON object or in words."""
    if as_json:
        emit(found)
    else:
        for line in lines:
            echo(line)


@app.command("run")
def run_site(
    config: Config = _HERE,
    health: Annotated[
        int | None,
        typer.Option(
            "--health", min=0, max=65535, help="Answer /healthz and /readyz on this loopback port."
        ),
    ] = None,
) -> None:
    """Take part in the federation until told to stop."""
    from fedcore_clients.app import run as begin
    from fedcore_clients.config import read_config

    start_logging()
    begin(read_config(config), echo, health)


@app.command()
def join(
    line: Annotated[
        str, typer.Argument(help="The line of `fed-coordinator invite`; default: read from stdin.")
    ] = "-",
    out: Annotated[Path, typer.Option("--out", help="The site's folder.")] = Path(),
    task: Annotated[
        str | None, typer.Option("--task", help="A task that may run here: heart, or path/task.py")
    ] = None,
    source: Annotated[str, typer.Option("--source", help="This site's data for it.")] = "",
    proxy: Annotated[
        str,
        typer.Option(
            "--proxy",
            help="http://[USER@]HOST:PORT or socks5://... of a proxy to connect through; or: environment",
        ),
    ] = "none",
    proxy_password: Annotated[
        str | None,
        typer.Option("--proxy-password", help="Where its password is: file:PATH or env:NAME."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="If it must be approved, ask again until it is.")
    ] = False,
    request: Annotated[
        Path | None, typer.Option("--request", help="Write the request to this file; send nothing.")
    ] = None,
    answer: Annotated[
        Path | None, typer.Option("--answer", help="Read the answer to it from this file.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Join a federation. Makes this site's keys here, and fetches its certificate and the roster."""
    from fedcore_clients import joining

    from fedcore.files import write_json
    from fedcore.identity.join_messages import key_fingerprint
    from fedcore.identity.proxies import ProxySection

    through = ProxySection(url=proxy, password=proxy_password).placed(Path.cwd(), "--proxy")
    allowed = [joining.find_task(task, source)] if task else []
    if answer is not None:
        found = joining.read_answer(answer)
    elif request is not None:
        asked = joining.begin(_join_line(line), out)
        write_json(request, asked.to_json())
        shown = key_fingerprint(asked.identity)
        _print(as_json, {"state": "asked", "request": str(request), "identity": shown}, [
            f"wrote {request}: bring it to the operator; it holds no private key and no token",
            f"identity key {shown}: the operator compares it",
            f"then: fed-site join --answer FILE --out {out}",
        ])  # fmt: skip
        return
    else:
        found = _joined_online(_join_line(line), out, through, wait, as_json)
    now = datetime.now(UTC)
    if answer is not None and joining.has_joined(out):
        done = joining.renewed(out, found, now)
    else:
        done = joining.finish(out, found, now, tasks=allowed, proxy=through)
    about = {
        "state": "joined", "site": done.site, "federation": done.federation,
        "roster": done.roster.number, "certificate_until": done.until.isoformat(), "files": [*done.wrote],
    }  # fmt: skip
    _print(as_json, about, done.lines(out))


def _join_line(text: str) -> JoinLine:
    """The join line of an argument or of stdin: an argument can be read in the list of processes."""
    from fedcore.identity.join_messages import JoinLine as Found

    if text == "-":
        if sys.stdin.isatty():
            say("join line:")
        text = sys.stdin.readline()
    return Found.parse(text)


def _joined_online(
    line: JoinLine, folder: Path, proxy: ProxySection, wait: bool, as_json: bool
) -> JoinAnswer:
    """The coordinator's answer; ends the command where the site must be approved first."""
    from fedcore_clients import joining

    from fedcore.identity.join_messages import key_fingerprint

    told = False
    while (found := joining.ask(line, folder, proxy.open(), datetime.now(UTC))) is None:
        shown = key_fingerprint(joining.begin(line, folder).identity)
        if not told:
            say(
                f"asked to join as {line.site!r}; the operator has to approve it: fed-coordinator approve {line.site}"
            )
            say(f"identity key {shown}: tell the operator, who sees it in `fed-coordinator sites`")
        if not wait:
            say("hint: run the same command again after that, or with --wait")
            if as_json:
                emit({"state": "waiting", "identity": shown})
            raise typer.Exit(EXIT_REFUSED)
        told = True
        time.sleep(ASK_SECONDS)
    return found


@app.command()
def renew(
    new_key: Annotated[
        bool,
        typer.Option("--new-key", help="Make a new TLS key, for the next certificate."),
    ] = False,
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Show when the certificate is renewed. That happens by itself, for the same key or for a new one."""
    from fedcore_clients.config import read_config
    from fedcore_clients.next_key import NEXT_KEY, make_next_key
    from fedcore_clients.renewal import due_at

    from fedcore.identity.kit import PublicKit

    site = read_config(config)
    peer = PublicKit.load(site.kit).peer
    made = new_key and make_next_key(site)
    waits = (site.kit / NEXT_KEY).exists()
    due = due_at(peer, new_key=waits)
    key = f"a new key ({site.kit / NEXT_KEY})" if waits else "the key that it has"
    _print(
        as_json,
        {
            "until": peer.ends.isoformat(),
            "renewed_from": due.isoformat(),
            "new_key": waits,
            "made": made,
        },
        [
            f"certificate until {peer.ends:%Y-%m-%d %H:%M} UTC; from {due:%Y-%m-%d %H:%M} UTC on the running site asks "
            f"for the next one, for {key}",
            *(["fed-site renew --new-key makes a new key for it"] if not waits else []),
        ],
    )


@app.command()
def check(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Try everything this site needs. Config, keys, tasks and their hashes, data, network, clock."""
    from fedcore_clients.check import examine

    found = []
    for each in examine(config):
        found.append(each)
        if as_json:
            continue
        echo(f"{'OK  ' if each.ok else 'FAIL'}  {each.name:<12}  {each.found}")
        if each.traceback:
            say(each.traceback.rstrip())
        if each.remedy:
            echo(f"      hint: {each.remedy}")
    failed = [each for each in found if not each.ok]
    if as_json:
        emit({"ok": not failed, "checks": [each.to_json() for each in found]})
    if failed:
        raise typer.Exit(failed[0].exit_code)


@app.command()
def status(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Show what this site's process does. Connection, jobs, rounds, errors, last model."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import read_status, status_lines

    found = read_status(read_config(config).folder)
    _print(as_json, found, status_lines(found))
    if not found["running"]:
        raise typer.Exit(EXIT_REFUSED)


@app.command("jobs")
def list_jobs(config: Config = _HERE, as_json: AsJson = False) -> None:
    """List the jobs this site was offered. State, task, protection, what it waits for, why it was refused."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import jobs_lines, read_jobs

    found = read_jobs(read_config(config).folder)
    _print(as_json, {"jobs": found}, jobs_lines(found))


@app.command()
def explain(
    what: Annotated[
        str, typer.Argument(help="A job's id, a job file, or a plan.json.", metavar="JOB|PLAN")
    ],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """List everything that a job would send. Each field, its type, bytes, range, and who can read it."""
    from fedcore_clients.config import read_config
    from fedcore_clients.explain import explain as explain_job
    from fedcore_clients.explain import explained_lines

    found = explain_job(read_config(config), what)
    _print(as_json, found.to_json(), explained_lines(found))


@app.command()
def approve(
    job: Annotated[str, typer.Argument(help="The job's id, as `fed-site jobs` prints it.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Let a job begin that waits for approval. That is with `jobs = "ask"` under [policy]; prints what it takes."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import about_lines
    from fedcore_clients.status import approve as approve_job

    row = approve_job(read_config(config).folder, job)
    shown = {key: row[key] for key in ("job", "task", "offer", "label", "leaves")}
    about = f"task {row['task']}, {row['protection']}, {row['rounds']} rounds"
    _print(as_json, shown, [f"job {job} approved: {about}", *about_lines(row)])


def _told(config: Path, as_json: bool, control: Control, done: str) -> None:
    """Print what the operator decided, and when it takes effect."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import runs

    acts = runs(read_config(config).folder)
    when = "the running process acts on it now" if acts else "it holds when the process starts"
    found = {"away": control.away, "vetoed": list(control.vetoed), "running": acts}
    _print(as_json, found, [f"{done}: {when}"])


@app.command()
def pause(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Take part in nothing until `fed-site resume`. Acts at once, and holds across restarts."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import pause as pause_site

    _told(config, as_json, pause_site(read_config(config).folder), "paused")


@app.command()
def resume(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Take part again, after `pause` or `leave`."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import resume as resume_site

    _told(config, as_json, resume_site(read_config(config).folder), "resumed")


@app.command()
def leave(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Leave the federation. No further part in any job under way; `fed-site resume` comes back for later ones."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import leave as leave_all
    from fedcore_clients.status import under_way

    folder = read_config(config).folder
    _told(config, as_json, leave_all(folder, under_way(folder)), "left")


@app.command()
def veto(
    job: Annotated[str, typer.Argument(help="The job's id, as `fed-site jobs` prints it.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Take no further part in one job, for good. The others continue without this site."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import read_control
    from fedcore_clients.status import veto_job

    folder = read_config(config).folder
    veto_job(folder, job)
    _told(config, as_json, read_control(folder), f"job {job} vetoed")


roster_app = typer.Typer(help="Show the roster, or approve a new one.", invoke_without_command=True)
app.add_typer(roster_app, name="roster")


@roster_app.callback()
def roster(asked: typer.Context, config: Config = _HERE, as_json: AsJson = False) -> None:
    """Show the roster in force, and what changed in a new one that waits for approval."""
    from fedcore_clients.config import read_config
    from fedcore_clients.rosters import approved_roster, newest_roster, roster_json, roster_lines

    from fedcore.identity.kit import PublicKit

    if asked.invoked_subcommand is not None:
        return
    site = read_config(config)
    kit = PublicKit.load(site.kit)
    current = approved_roster(site, kit)
    found = roster_json(current, newest_roster(site, kit, current))
    _print(as_json, found, roster_lines(found))


@roster_app.command("approve")
def approve_number(
    number: Annotated[int, typer.Argument(help="The number that `fed-site roster` shows.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Take part in jobs of the roster that waits. The running fed-site notices it."""
    from fedcore_clients.config import read_config
    from fedcore_clients.rosters import approve_roster

    from fedcore.identity.kit import PublicKit

    site = read_config(config)
    found = approve_roster(site, PublicKit.load(site.kit), number)["waiting"]
    lines = [f"roster {number} approved: {len(found['sites'])} sites", *found["changes"]]
    _print(as_json, found, lines)


keystore_app = typer.Typer(help="Encrypt this site's private keys at rest.", no_args_is_help=True)
app.add_typer(keystore_app, name="keystore")


@keystore_app.command("encrypt")
def encrypt_keys(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Encrypt keys, journal, models and ledger. With the passphrase that [keystore] names; may be repeated."""
    from fedcore_clients.config import read_config
    from fedcore_clients.private_files import encrypt, encrypted_lines

    found = encrypt(read_config(config))
    _print(as_json, found, encrypted_lines(found))


@keystore_app.command("rotate")
def rotate_passphrase(
    new: Annotated[
        str, typer.Option("--new", help="Where the new passphrase is: as `unlock` in [keystore].")
    ] = "prompt",
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Change the passphrase. Keys and journal stay as they are."""
    from fedcore_clients.config import read_config
    from fedcore_clients.private_files import rotate

    from fedcore.identity.keystore_backup import rotated_lines

    found = rotate(read_config(config), new)
    _print(as_json, found, rotated_lines(found))


@keystore_app.command("backup")
def back_up_keys(
    file: Annotated[Path, typer.Argument(help="The file to write.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Write an encrypted copy of the keys. It opens with the passphrase; the journal is not in it."""
    from fedcore_clients.config import read_config
    from fedcore_clients.private_files import back_up

    from fedcore.identity.keystore_backup import backed_up_lines

    found = back_up(read_config(config), file)
    why = "the journal is not in it: a site put back to an earlier moment of a round could answer twice"
    _print(as_json, found, [*backed_up_lines(found), why])


@keystore_app.command("restore")
def restore_keys(
    file: Annotated[Path, typer.Argument(help="A file of `fed-site keystore backup`.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Put the keys of a backup in their places. Overwrites nothing."""
    from fedcore_clients.config import read_config
    from fedcore_clients.private_files import restore

    from fedcore.identity.keystore_backup import restored_lines

    found = restore(read_config(config), file)
    _print(as_json, found, [*restored_lines(found), "next: fed-site check"])


@keystore_app.command("status")
def show_keystore(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Show which private keys are encrypted. Needs no passphrase."""
    from fedcore_clients.config import read_config
    from fedcore_clients.private_files import keystore_lines, keystore_status

    found = keystore_status(read_config(config))
    _print(as_json, found, keystore_lines(found))
    if found["file"] is not None and not found["at_rest"]:
        raise typer.Exit(EXIT_REFUSED)


@app.command()
def ledger(config: Config = _HERE, as_json: AsJson = False) -> None:
    """List what was released of this site's rows. Each sum, when, for which job, with which sites."""
    from fedcore_clients.config import read_config
    from fedcore_clients.ledger import ledger_lines, read_ledger

    place = read_config(config)
    found = read_ledger(place.folder, place.ledger_sealer())
    _print(as_json, {"exposures": [each.to_json() for each in found]}, ledger_lines(found))


@app.command()
def privacy(config: Config = _HERE, as_json: AsJson = False) -> None:
    """List what jobs spent of the privacy of this site's rows. Epsilon of each set of rows, and of each job."""
    from fedcore_clients.config import read_config
    from fedcore_clients.ledger import read_spends
    from fedcore_clients.privacy_limits import spend_lines, spends_json

    found = read_config(config)
    spends, limits = read_spends(found.folder, found.ledger_sealer()), found.policy
    _print(as_json, spends_json(spends, limits), spend_lines(spends, limits))


@app.command()
def model(
    job: Annotated[str, typer.Argument(help="The job's id, as `fed-site status` prints it.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, *.safetensors.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Write the model that this site was released. With its statistics, as `fedcore simulate` does."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import export_model

    found = export_model(read_config(config), job, out)
    line = f"wrote {out}: after round {found['round']}, sha256 {found['model_sha256']}"
    _print(as_json, found, [line])


def _trail(config: Path) -> TrailPlace:
    from fedcore_clients.config import read_config
    from fedcore_clients.rosters import APPROVED_FILE, NEWEST_FILE, ROSTERS_FOLDER

    from fedcore.audit.evidence import TrustedParties
    from fedcore.audit.keys import site_key
    from fedcore.identity.kit import PublicKit
    from fedcore.identity.signed_roster import kept_pins, read_pins
    from fedcore.types import SiteId

    found = read_config(config)
    kit = PublicKit.load(found.kit)
    authority, federation = kit.authority_pem, kit.peer.federation
    pins: dict[SiteId, bytes] = {}
    for path in (found.folder / NEWEST_FILE, found.folder / APPROVED_FILE, found.roster):
        if found.site not in pins and (path.is_file() or path == found.roster):
            pins, _ = read_pins(path, authority, federation)
    pinned = pins.get(SiteId(found.site))
    if pinned is None:
        raise BadInput(f"roster: found no site {found.site!r} on it, expected its identity key")
    every = kept_pins(found.folder / ROSTERS_FOLDER, authority, federation, pins)
    return TrailPlace(
        found.folder, f"site {found.site}", lambda _: {site_key(pinned)},
        TrustedParties(federation, authority, every, found.site), found.folder,
    )  # fmt: skip


app.add_typer(audit_commands(_trail, _HERE), name="audit")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fed-site` command; always ends in SystemExit."""
    run(app, "fed-site", arguments)


if __name__ == "__main__":
    main()
