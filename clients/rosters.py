"""The rosters of a site: the newest one seen, and the one that it approved, whose jobs it takes.

The coordinator sends the newest roster in the session. It counts only if the federation's authority signed it, and is
kept in the site's folder: `roster-newest.toml` is the newest seen, also of those that wait for the operator, and
`roster-approved.toml` the one in force (before there is one, roster.toml). `fed-site roster approve` writes the
second file, which the running process polls; with `roster = "any"` in the policy the process writes it itself.

Invariant: neither number ever goes down, so that a site which was removed cannot be put back by an old roster; of one
number there is one roster. A job is taken under the approved roster only, named by its digest before the offer.
Rosters that other sites see need no check here: the header of every round has the digest, under every signature.
"""

import logging
from collections.abc import Collection
from pathlib import Path

from fedcore_clients.config import SiteConfig
from fedcore_clients.policy import SitePolicy

from fedcore.audit.trail import Recorder
from fedcore.errors import BadInput, Refused, RosterRefused, SignatureRefused, with_hint
from fedcore.files import WatchedFile, write_atomic
from fedcore.files.disk import make_folder, sync_folder
from fedcore.identity.kit import Kit, PublicKit
from fedcore.identity.roster import PinnedRoster, RosterFile, read_file
from fedcore.identity.signed_roster import SignedRoster, changes_of, keep_roster
from fedcore.secagg.plan import default_threshold
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.types import Json
from fedcore.wire.frames import JobRoster, RosterSeen

LOG = logging.getLogger("fedcore.site.roster")

NEWEST_FILE, APPROVED_FILE = "roster-newest.toml", "roster-approved.toml"
ROSTERS_FOLDER = "rosters"
"""Every roster that this site has seen."""
WAITING, APPROVED = "waiting", "approved"
MOST_HELD = 64
"""Offers that wait for the approval of their roster, and jobs whose roster was named."""


def _kept(path: Path, kit: Kit | PublicKit, otherwise: PinnedRoster) -> PinnedRoster:
    """The roster of a file where there is one that is newer. Raises what `read_file` raises."""
    if not path.is_file():
        return otherwise
    found = read_file(path, kit.authority_pem, kit.peer.federation)
    return found if found.number > otherwise.number else otherwise


def approved_roster(config: SiteConfig, kit: Kit | PublicKit) -> PinnedRoster:
    """The roster in force. Raises BadInput, SignatureRefused, RosterRefused."""
    placed = read_file(config.roster, kit.authority_pem, kit.peer.federation)
    return _kept(config.folder / APPROVED_FILE, kit, placed)


def newest_roster(config: SiteConfig, kit: Kit | PublicKit, approved: PinnedRoster) -> PinnedRoster:
    """The newest roster seen here. Raises BadInput, SignatureRefused, RosterRefused."""
    return _kept(config.folder / NEWEST_FILE, kit, approved)


def _write(path: Path, roster: PinnedRoster) -> None:
    make_folder(path.parent)
    write_atomic(path, roster.document)
    path.chmod(0o600)
    sync_folder(path.parent)


def roster_json(current: PinnedRoster, newest: PinnedRoster) -> Json:
    """What `fed-site roster` and the status show; `waiting` is None where the newest is approved."""
    waits = newest.number > current.number
    return {
        "number": current.number, "digest": current.digest, "sites": [*current.sites],
        "waiting": {
            "number": newest.number, "sites": [*newest.sites],
            "changes": changes_of(newest.sites, current.sites),
            "threshold": default_threshold(len(newest.sites)),
        } if waits else None,
    }  # fmt: skip


class SiteRosters:
    """The rosters of a running site. rosters.current: the one in force; held: offers that wait for an approval."""

    def __init__(
        self, config: SiteConfig, kit: Kit, rosters: RosterFile, policy: SitePolicy, audit: Recorder
    ) -> None:
        """Raises BadInput, SignatureRefused and RosterRefused for a file that was altered."""
        self._folder, self._kit, self._rosters = config.folder, kit, rosters
        self._policy, self._audit = policy, audit
        self.newest = newest_roster(config, kit, rosters.current)
        self.problem = ""
        """Why the last roster of the coordinator is not taken, in one line; "" where it is."""
        self.held: dict[str, JobOffer] = {}
        self._named: dict[str, JobRoster] = {}
        """The roster of each job that the coordinator is about to offer."""
        self._approved = WatchedFile(config.folder / APPROVED_FILE)

    @property
    def waits(self) -> bool:
        """Whether the newest roster waits for the operator's approval."""
        return self.newest.number > self._rosters.current.number

    def take(self, document: bytes) -> RosterSeen:
        """What to answer to a roster from the coordinator. Raises StoreProblem, OSError."""
        try:
            signed = SignedRoster.parse(document)
            signed.verify(self._kit.authority_pem, self._kit.peer.federation)
        except BadInput as error:
            return self._refuse("malformed", error)
        except (SignatureRefused, RosterRefused) as error:
            return self._refuse("signature", error)
        found = PinnedRoster(dict(signed.sites), signed.number, document)
        try:
            found.follows(self.newest, "the coordinator's roster")
        except RosterRefused as error:
            same = found.number == self.newest.number
            return self._refuse("differs" if same else "older", error)
        self.problem = ""
        if found.number > self.newest.number:
            for each in (self._rosters.current, found):
                self._keep(each)
            _write(self._folder / NEWEST_FILE, found)
            self.newest = found
            changes = changes_of(found.sites, self._rosters.current.sites)
            self._audit.record("roster", what="seen", number=found.number, digest=found.digest)
            for line in changes or ["the same sites"]:
                LOG.warning("roster %d: %s", found.number, line)
        self._by_policy()
        if self.waits:
            LOG.warning(
                "roster %d waits for approval: fed-site roster approve %d", found.number,
                found.number,
            )  # fmt: skip
        return self.answer()

    def _keep(self, roster: PinnedRoster) -> None:
        if roster.document:
            keep_roster(self._folder / ROSTERS_FOLDER, SignedRoster.parse(roster.document))

    def _seen(self, word: str) -> RosterSeen:
        return RosterSeen(self._rosters.current.number, word)

    def _refuse(self, word: str, error: Refused | BadInput) -> RosterSeen:
        line = with_hint(error)
        if line != self.problem:
            LOG.error("roster of the coordinator: %s", line)
            self._audit.record("refused", what="roster", why=word)
        self.problem = line
        return self._seen(word)

    def _by_policy(self) -> None:
        if self.waits and self._policy.rules.roster == "any":
            _write(self._folder / APPROVED_FILE, self.newest)
            self._adopt(self.newest, "policy")

    def _adopt(self, found: PinnedRoster, by: str) -> None:
        self._audit.record(
            "roster", what="approved", number=found.number, digest=found.digest, by=by
        )
        self._rosters.current = found
        self._policy.sites = len(found.sites)
        LOG.info("roster %d is in force: %d sites", found.number, len(found.sites))

    def refresh(self) -> bool:
        """Read what the operator approved or placed; True if another roster is in force now. Costs two stats."""
        before = self._rosters.current
        try:
            if self._rosters.refresh():  # roster.toml was replaced
                self._policy.sites = len(self._rosters.current.sites)
            if self._approved.changed():
                path = self._folder / APPROVED_FILE
                found = _kept(path, self._kit, self._rosters.current)
                if found is not self._rosters.current:
                    self._adopt(found, "operator")
            self._by_policy()
        except (BadInput, Refused) as error:
            self.problem = with_hint(error)
            LOG.error("roster: %s; the one in force stays", self.problem)  # noqa: TRY400 - one line
        if self._rosters.current.number > self.newest.number:
            self.newest = self._rosters.current
        return self._rosters.current is not before

    def answer(self) -> RosterSeen:
        """For the coordinator, after an approval."""
        return self._seen(WAITING if self.waits else APPROVED)

    def name(self, frame: JobRoster) -> None:
        """The roster of a job that is offered next."""
        self._named[frame.job] = frame
        if len(self._named) > MOST_HELD:
            del self._named[next(iter(self._named))]

    def word_on(self, offer: JobOffer) -> str:
        """Whether a job is taken now: a key of `ROSTER_WORDS`. One that waits is held until its roster is approved."""
        named, current = self._named.get(offer.job), self._rosters.current
        if named is None or named.digest == current.digest:
            return APPROVED  # a job whose roster is not named is under the one in force, or no round is
        if self.waits and named.digest == self.newest.digest:
            if offer.job not in self.held:
                LOG.warning("job %s waits: its roster is not approved here", offer.job)
            if len(self.held) < MOST_HELD:
                self.held[offer.job] = offer
            return WAITING
        word = "older" if named.number < current.number else "unknown"
        LOG.error(
            "job %s: refused: found roster %d (%s), expected roster %d (%s), the one in force here",
            offer.job, named.number, named.digest[:16], current.number, current.digest[:16],
        )  # fmt: skip
        self._audit.record("refused", what="job", job=offer.job, why=f"roster {word}")
        return word

    def released(self) -> list[JobOffer]:
        """Offers whose roster was approved meanwhile."""
        ready = [offer for offer in self.held.values() if self.word_on(offer) == APPROVED]
        for offer in ready:
            del self.held[offer.job]
        return ready

    def to_json(self) -> Json:
        """For the status."""
        about = roster_json(self._rosters.current, self.newest)
        return about | {"problem": self.problem, "held": [*self.held]}


def sites_text(sites: Collection[str]) -> str:
    """How many sites, in words."""
    return f"{len(sites)} site{'s' * (len(sites) != 1)}"


def roster_lines(about: Json) -> list[str]:
    """The rosters in words."""
    number, sites = about["number"], about["sites"]
    name = f"roster {number}" if number else "roster without a number"
    lines = [f"{name}: {sites_text(sites)}: {', '.join(sites)}"]
    waiting = about["waiting"]
    if waiting is not None:
        lines.append(
            f"roster {waiting['number']} waits for approval: fed-site roster approve {waiting['number']}"
        )
        lines += [f"  {line}" for line in waiting["changes"] or ["the same sites"]]
        count, least = len(waiting["sites"]), waiting["threshold"]
        lines.append(f"  then {least} of {count} sites are needed in every round, by default")
    lines += [f"  job {job} waits for it" for job in about.get("held", ())]
    if about.get("problem"):
        lines.append(f"roster: {about['problem']}")
    return lines


def approve_roster(config: SiteConfig, kit: Kit | PublicKit, number: int) -> Json:
    """Put the roster that waits in force; durable on return. What `roster_json` gave before.

    Raises Refused where none waits, BadInput for another number, and what `read_file` raises.
    """
    current = approved_roster(config, kit)
    newest = newest_roster(config, kit, current)
    if newest.number == current.number:
        raise Refused(
            f"roster {number}: found roster {current.number} in force and none that waits, expected a newer one",
            remedy="the running fed-site gets a new roster from the coordinator",
        )
    if number != newest.number:
        raise BadInput(
            f"roster: found number {number}, expected {newest.number}, the one that waits",
            remedy="`fed-site roster` shows what changed",
        )
    _write(config.folder / APPROVED_FILE, newest)
    return roster_json(current, newest)
