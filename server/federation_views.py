"""A federation's sites and roster as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedcore_server.federation import Enrolment, FederationFiles

from fedcore.identity.join_messages import key_fingerprint
from fedcore.identity.signed_roster import SignedRoster
from fedcore.results import JobSite
from fedcore.types import Json, SiteId

if TYPE_CHECKING:
    from rich.table import Table


def sites_rows(files: FederationFiles, seen: Mapping[str, JobSite] | None) -> list[Json]:
    """One row a site, of the roster or on its way in. seen: of the running coordinator, None where it is unknown."""
    roster, known = files.roster(), files.enrolments()
    names = dict.fromkeys([*roster.sites, *known])
    rows = []
    for name in names:
        found, key = known.get(name), roster.sites.get(SiteId(name))
        peer = found.peer if found else None
        rows.append(
            {
                "site": name, "state": _state(found), "on_roster": key is not None,
                "connected": None if seen is None else name in seen and seen[name].connected,
                "second": seen[name].second if seen and name in seen else "",
                "invitation_expires": found.expires if found and found.state == "invited" else None,
                "certificate_until": peer.ends.isoformat() if peer else None,
                "identity": key_fingerprint(_key(found, key)) if key or (found and found.request) else None,
            }
        )  # fmt: skip
    return rows


def _state(found: Enrolment | None) -> str:
    return found.state if found else "on the roster"


def _key(found: Enrolment | None, key: bytes | None) -> bytes:
    return key if key is not None else found.asked.identity if found else b""


def sites_table(rows: list[Json]) -> Table:
    """The rows for a person."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column(
        "site", overflow="fold"
    )  # the one that gives way: a cut fingerprint cannot be compared
    for name in ("state", "online", "certificate", "line until", "identity key"):
        table.add_column(name, no_wrap=True)
    for row in rows:
        connected = {None: "?", True: "yes", False: "no"}[row["connected"]]
        cells = (
            row["site"], row["state"], connected, (row["certificate_until"] or "")[:10],
            _day(row["invitation_expires"]), row["identity"] or "",
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    if not rows:
        table.add_row("no site was invited yet: fed-coordinator invite SITE")
    return table


def roster_json(roster: SignedRoster) -> Json:
    """For `--json`."""
    return {
        "federation": roster.federation, "number": roster.number, "issued": roster.issued.isoformat(),
        "digest": roster.digest, "signed_by": roster.by,
        "sites": {name: key.hex() for name, key in roster.sites.items()},
    }  # fmt: skip


def roster_lines(roster: SignedRoster) -> list[str]:
    """For a person."""
    wide = max(map(len, roster.sites), default=0)
    some = f"{len(roster.sites)} site{'' if len(roster.sites) == 1 else 's'}"
    return [
        f"roster {roster.number} of {roster.federation!r}, {some}, signed {roster.issued:%Y-%m-%d %H:%M} UTC "
        f"by the authority {roster.by[:16]}...",
        *(
            f"  {name:<{wide}}  identity key {key_fingerprint(key)}"
            for name, key in roster.sites.items()
        ),
    ]


def _day(text: str | None) -> str:
    return text[:16].replace("T", " ") if text else ""
