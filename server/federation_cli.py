"""fed-coordinator init, invite, sites, roster, approve, revoke, renew: a federation's files, changed by its operator.

They work on the folder of federation.toml and need no running coordinator; one that runs reads what they change.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.cli.console import echo, emit, page_console, say

if TYPE_CHECKING:
    from fedcore_server.federation import FederationFiles

    from fedcore.identity.authority import Authority
    from fedcore.identity.signed_roster import SignedRoster
    from fedcore.results import JobSite

Config = Annotated[Path, typer.Option("--config", help="The federation's file.")]
Passphrase = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        help="File (mode 0600) with the authority's passphrase; default: $FEDCORE_AUTHORITY_PASSPHRASE, else asked.",
    ),
]
AuthorityFolder = Annotated[
    Path | None,
    typer.Option("--authority", help="Folder of the authority; default: of federation.toml."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Site = Annotated[str, typer.Argument(help="The site's name.")]
_HERE = Path("federation.toml")


def add_commands(app: typer.Typer) -> None:
    """Add the commands to a program."""
    for command in (init, invite, sites, roster, approve, revoke, renew):
        app.command()(command)


def init(
    name: Annotated[str, typer.Argument(help="The federation's name.")],
    host: Annotated[
        list[str],
        typer.Option(
            "--host", help="Name or address by which sites reach the coordinator; repeatable."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder; default: the name.")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="For sites.")] = 7443,
    enrol_port: Annotated[
        int | None,
        typer.Option("--enrol-port", min=1, max=65535, help="For joining; default: port + 1."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port", min=1, max=65535, help="For Prometheus, on 127.0.0.1; default: off."
        ),
    ] = None,
    manual: Annotated[
        bool, typer.Option("--manual", help="Every site that joins waits for `approve`.")
    ] = False,
    unlock: Annotated[
        str,
        typer.Option(
            "--unlock",
            help="Where `serve` finds the passphrase, too: file:PATH, env:NAME, command:PROGRAM or prompt.",
        ),
    ] = "",
    key: Annotated[
        str,
        typer.Option(
            "--key",
            help="Make the authority's key in a token: pkcs11:token=...;object=...?module-path=...",
        ),
    ] = "",
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Make a federation. Its authority, the certificates of coordinator and operator, federation.toml."""
    from datetime import UTC, datetime

    from fedcore_server.authority_key import ASKED, find_unlock, read_passphrase
    from fedcore_server.new_federation import create

    from fedcore.identity.passphrase import KeystoreSection

    if unlock:
        unlock = KeystoreSection(unlock=unlock).placed(Path.cwd() / "x", "--unlock").unlock
    where = find_unlock(passphrase_file, unlock) or ASKED
    passphrase = read_passphrase(where, new=not key)  # a PIN is as long as its token wants it
    made = create(
        name, out or Path(name), host, passphrase, datetime.now(UTC), port=port,
        enrol_port=enrol_port or port + 1, approval="manual" if manual else "automatic",
        metrics_port=metrics_port, unlock=unlock, key=key,
    )  # fmt: skip
    _files(made.folder / "federation.toml").note("init", datetime.now(UTC), sha256=made.fingerprint)
    if as_json:
        emit({"federation": name, "folder": str(made.folder), "fingerprint": made.fingerprint})
        return
    for line in made.lines():
        echo(line)


def invite(
    site: Site,
    days: Annotated[
        float, typer.Option("--days", min=0.01, max=365, help="How long it is valid.")
    ] = 7,
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Print the line with which one site joins. It works once, and for so many days."""
    from datetime import UTC, datetime, timedelta

    now = datetime.now(UTC)
    files = _files(config)
    line, replaces = files.invite(site, days, now)
    until = now + timedelta(days=days)
    files.note("invite", now, site=site, expires=until.isoformat(timespec="seconds"))
    if as_json:
        emit({"site": site, "line": line.text(), "expires": until.isoformat(timespec="seconds")})
        return
    if replaces:
        say(f"the earlier line for {site!r} no longer works")
    say(
        f"for {site!r}, once, until {until:%Y-%m-%d %H:%M} UTC; whoever has it can join as {site!r}, "
        "so send it confidentially; there: fed-site join 'LINE'"
    )
    echo(line.text())


def sites(config: Config = _HERE, as_json: AsJson = False) -> None:
    """List the sites. Invited, asked, approved, joined or revoked; connected; until when."""
    from fedcore_server.federation_views import sites_rows, sites_table

    files = _files(config)
    connected, why = _connected(config)
    rows = sites_rows(files, connected)
    seconds = {row["site"]: row["second"] for row in rows if row["second"]}
    if as_json:
        emit({"federation": files.config.name, "sites": rows})
        return
    if why:
        say(f"whether they are connected is unknown: {why}")
    page_console().print(sites_table(rows))
    for site, second in seconds.items():
        say(
            f"site {site!r}: {second}; if it is not the institution's, somebody has its keys: fed-coordinator revoke "
            f"{site}, then invite it again"
        )


def roster(
    sign: Annotated[
        bool, typer.Option("--sign", help="Sign one without the sites that were revoked meanwhile.")
    ] = False,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Show the signed roster. Its number, its sites and the fingerprints of their identity keys."""
    from fedcore_server.federation_views import roster_json, roster_lines

    files = _files(config)
    found = _signed(files, authority, passphrase_file) if sign else files.roster()
    if as_json:
        emit(roster_json(found))
        return
    for line in roster_lines(found):
        echo(line)


def approve(
    site: Site,
    request: Annotated[
        Path | None, typer.Option("--request", help="The file of `fed-site join --request`.")
    ] = None,
    answer: Annotated[
        Path | None,
        typer.Option("--answer", help="Write the site's certificate and the roster to this file."),
    ] = None,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Let a site in that has asked. Makes its certificate and a new roster."""
    from datetime import UTC, datetime

    from fedcore.errors import BadInput
    from fedcore.files import write_json
    from fedcore.identity.join_messages import MOST_REQUEST, JoinRequest, key_fingerprint
    from fedcore.identity.kit import read_limited

    files, now = _files(config), datetime.now(UTC)
    if request is not None:
        asked = JoinRequest.parse(
            read_limited(request, f"a request of at most {MOST_REQUEST} bytes")
        )
        if asked.site != site:
            raise BadInput(f"{request}: found a request of site {asked.site!r}, expected {site!r}")
        files.ask(asked, now)
    else:
        asked = files.requested(site)
    found = files.approve(site, _authority(files, authority, passphrase_file), now)
    if answer is not None:
        write_json(answer, files.answer(found).to_json())
    files.note("approve", now, site=site, roster=files.roster().number, serial=found.serials[-1])
    shown = key_fingerprint(asked.identity)
    number, until = files.roster().number, f"{found.peer.ends:%Y-%m-%d}" if found.peer else ""
    if as_json:
        emit(
            {
                "site": site,
                "roster": number,
                "certificate_until": until,
                "identity": shown,
            }
        )
        return
    echo(f"site {site!r} is on roster {number}, certificate until {until}, identity key {shown}")
    if answer is not None:
        echo(f"wrote {answer}, for the site: fed-site join --answer FILE; it holds nothing secret")
    else:
        echo("it gets the certificate when it runs `fed-site join` again")


def revoke(
    site: Site,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Cut a site off. Revokes its certificates and its invitation, and takes it off the roster."""
    from datetime import UTC, datetime

    from fedcore_server.authority_key import authority_folder

    files = _files(config)
    # First without the authority: a wrong passphrase must not delay it.
    count = files.revoke(site)
    files.note("revoke", datetime.now(UTC), site=site, certificates=count)
    some = f"{count} certificate{'' if count == 1 else 's'}"
    if not as_json:
        echo(f"site {site!r} is revoked ({some}): a running coordinator cuts it off within seconds")
    number = None
    if authority_folder(files.config, authority) is not None:
        number = _signed(files, authority, passphrase_file).number
    if as_json:
        emit({"site": site, "certificates": count, "roster": number})
    elif number is None:
        echo(
            "the roster still lists it: where the authority is, run `fed-coordinator roster --sign --authority FOLDER`"
        )
    else:
        echo(f"roster {number} is without it")


def renew(
    site: Annotated[
        str, typer.Argument(help="The site; without one: the coordinator and the operator.")
    ] = "",
    answer: Annotated[
        Path | None, typer.Option("--answer", help="Write a site's new certificate to this file.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="A further name or address of the coordinator; repeatable."),
    ] = None,
    days: Annotated[
        float, typer.Option("--days", min=1, max=3650, help="Of coordinator and operator.")
    ] = 365,
    config: Config = _HERE,
    authority: AuthorityFolder = None,
    passphrase_file: Passphrase = None,
    as_json: AsJson = False,
) -> None:
    """Make new certificates, for the keys in use. Sites renew their own by themselves."""
    from datetime import UTC, datetime

    from fedcore.errors import BadInput
    from fedcore.files import write_json
    from fedcore.identity.peer import peer_of

    if bool(site) != (answer is not None):
        raise BadInput(
            f"renew: found {'no --answer FILE' if site else 'no site'}, expected both or neither",
            remedy="fed-coordinator renew SITE --answer FILE, for a site whose certificate was not renewed by itself",
        )
    files, now = _files(config), datetime.now(UTC)
    opened = _authority(files, authority, passphrase_file)
    if answer is not None:
        found = files.renew(site, None, opened, now)
        write_json(answer, found.to_json())
        renewed = [peer_of(found.certificate)]
    else:
        renewed = files.renew_own(opened, host or [], now, days)
    for peer in renewed:
        files.note("renew", now, party=str(peer), serial=peer.serial)
    if as_json:
        emit(
            {
                "renewed": [
                    {"party": f"{p.role} {p.name}", "until": p.ends.isoformat()} for p in renewed
                ]
            }
        )
        return
    for peer in renewed:
        echo(f"{peer}: until {peer.ends:%Y-%m-%d}")
    if answer is not None:
        echo(f"wrote {answer}, for the site: fed-site join --answer FILE")
    else:
        echo("a running coordinator shows the new certificate from its next connection on")


def _files(config: Path) -> FederationFiles:
    from fedcore_server.config import read_config
    from fedcore_server.federation import FederationFiles as Found

    return Found(read_config(config))


def _authority(files: FederationFiles, folder: Path | None, passphrase: Path | None) -> Authority:
    from fedcore_server.authority_key import (
        ASKED,
        find_unlock,
        open_authority,
        required_folder,
    )

    config = files.config
    unlock = find_unlock(passphrase, config.enrolment.unlock) or ASKED
    return open_authority(config, required_folder(config, folder), unlock)


def _signed(
    files: FederationFiles, authority: Path | None, passphrase: Path | None
) -> SignedRoster:
    """The roster without the sites that were revoked, signed with the authority's key."""
    from datetime import UTC, datetime

    now = datetime.now(UTC)
    found = files.sign_roster(_authority(files, authority, passphrase), now)
    files.note("sign roster", now, number=found.number, digest=found.digest)
    return found


def _connected(config: Path) -> tuple[dict[str, JobSite] | None, str]:
    """The sites as the running coordinator sees them; None and the reason where it cannot be asked."""
    from fedcore_server.config import OPERATOR_FILE, find_place
    from fedcore_server.operators import Operator

    from fedcore.errors import FedcoreError
    from fedcore.results import JobSite
    from fedcore.wire import calls, frames

    place = config.absolute().parent / "operator" / OPERATOR_FILE
    try:
        operator = Operator(find_place(None, None, place))
        found = frames.json_value(
            operator.ask(calls.JOBS, frames.JobsRequest()).json, sender="coordinator"
        )
    except FedcoreError as error:
        return None, str(error)
    return {name: JobSite.from_json(site) for name, site in found["sites"].items()}, ""
