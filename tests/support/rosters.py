"""Signed rosters, and a site's rosters in its folder, for tests."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

from fedcore_clients.rosters import SiteRosters, approved_roster
from support.policies import policy_of

from fedcore.audit.trail import NoTrail
from fedcore.identity.authority import Authority
from fedcore.identity.roster import RosterFile
from fedcore.identity.signed_roster import SignedRoster
from fedcore.secagg.crypto.identity_key import IdentityKey

IDENTITIES = {name: IdentityKey() for name in "abcdexyz"}
KEYS = {name: identity.public for name, identity in IDENTITIES.items()}
AUTHORITY, OTHER = (Authority.create("town", datetime.now(UTC)) for _ in range(2))


def document(number, names, authority=AUTHORITY, federation="town", **keys):
    """A signed roster of these sites as it travels. keys: {site: public key} other than its own."""
    sites = {name: keys.get(name, KEYS[name]) for name in names}
    made = SignedRoster("town", number, datetime(2026, 11, 30, tzinfo=UTC), sites)
    return replace(made, federation=federation).sign(authority).to_toml()


class Trail(NoTrail):
    """Keeps what is recorded."""

    def __init__(self):
        self.events = []

    def record(self, event, /, **facts):
        super().record(event, **facts)
        self.events.append((event, facts))


class SiteFolder:
    """A site's folder with roster.toml, number 1 of a, b, c; `start` is what a new process reads."""

    def __init__(self, folder, placed=None, **rules):
        self.folder, self.rules, self.trail = folder, rules, Trail()
        self.config = SimpleNamespace(folder=folder / "state", roster=folder / "roster.toml")
        self.kit = SimpleNamespace(
            authority_pem=AUTHORITY.certificate_pem, peer=SimpleNamespace(federation="town")
        )
        self.config.roster.write_bytes(placed or document(1, "abc"))
        self.start()

    def start(self):
        config, kit = self.config, self.kit
        current = approved_roster(config, kit)
        self.live = RosterFile(current, config.roster, kit.authority_pem, "town")
        self.live.known()
        self.policy = policy_of(len(current.sites), **self.rules)
        self.rosters = SiteRosters(config, kit, self.live, self.policy, self.trail)

    def take(self, number, names, *more, **keys):
        """The word on a roster from the coordinator."""
        return self.rosters.take(document(number, names, *more, **keys)).word

    @property
    def sites(self):
        """Of the roster in force."""
        return "".join(self.live.current.sites)
