"""The rounds of one job: their beginning, deadlines, uploads and end.

The rules of one round are in `round/coordinator/`; this part decides between rounds, and when records
go to disk. Records that nothing relies on yet are batched until the next ones or the timer: a process that
ends meanwhile loses only messages that their senders resend.
"""

from collections.abc import Collection
from dataclasses import replace

from fedcore.results import AbandonedRound, JobRow
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages, schedule
from fedcore.secagg.protocol.effects import Persist
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, KeptFile, Moment
from fedcore.secagg.protocol.job.coordinator.sent_ahead import SentAhead
from fedcore.secagg.protocol.job.effects import JobEffects
from fedcore.secagg.protocol.job_messages import SiteStatus
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import SiteId

MOST_TRIES = 12
"""Times in a row that a step on which the next ones depend may be abandoned. Only rounds whose sum is not
exposed are retried: any other is released, or the job ends (PROTOCOL H)."""

NO_OTHER_SUM = "; its sum may be known, so no other may be taken from the same state"


def _names(sites: Collection[SiteId]) -> str:
    return f"{'site' if len(sites) == 1 else 'sites'} {', '.join(sites)}"


class RoundDriver:
    """The rounds of one job, and the one under way."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._hub = coordinator.CoordinatorParams(
            dict(facts.pins), facts.limits.stage, facts.limits.vectors
        )
        self._submits: dict[SiteId, messages.Submit] = {}
        self._uploads: dict[SiteId, KeptFile] = {}
        self._ahead = SentAhead()
        self._sum_size: int | None = None
        self._begun = self._stage_since = 0.0
        self._stage_seconds: dict[str, float] = {}
        self._restarted = self._sum_lost = False
        self._unsaved = effects.AppendRecords(())
        self.short_since: float | None = None
        """Clock seconds since which a round that has to be released lacks sites."""
        self._summing: tuple[bytes, float] = b"", 0.0
        """Header of the sum under way, and the clock seconds at which making it began."""

    def restore(self, announced: KeptFile | None, at: Moment, *, restarted: bool) -> None:
        """Reset to what the disk has. announced: the sum of the round under way."""
        self._clear(at)
        self._sum_lost = announced is None and isinstance(self._facts.stage, coordinator.Releasing)
        self._sum_size = None if announced is None else announced.size
        self._restarted = restarted

    def _clear(self, at: Moment) -> None:
        self._submits, self._uploads, self._sum_size = {}, {}, None
        self._ahead = SentAhead()
        self._begun = self._stage_since = at.now
        self._stage_seconds = {}
        self._restarted, self._unsaved = False, effects.AppendRecords(())
        self._sum_lost = False

    def begin(
        self, step: schedule.PlannedRound, roster: tuple[SiteId, ...], at: Moment
    ) -> tuple[RoundHeader, list[coordinator.CoordinatorEvent]]:
        """The next round, with these sites, and its first events: `Start`, and the shares that were sent ahead."""
        facts, plan = self._facts, self._facts.plan
        assert plan is not None
        seen = [view.rest.round for view in facts.sites.values() if view.rest]
        header = RoundHeader(
            facts.federation, facts.id, facts.epoch.epoch, max([facts.number, *seen]) + 1,
            step.training_round, step.purpose, roster, roster_digest(facts.pins),
            plan.threshold, plan.protection, plan.digest, facts.released,
        )  # fmt: skip
        keys, shares = self._ahead.for_round(self._hub, header)
        if self._ahead.keys and not keys:  # this number may be used up
            header = replace(header, round=header.round + 1)
        self._clear(at)
        for name in roster:
            facts.sites[name].rest = None
        start = coordinator.Start(header, facts.sizes[step.purpose], plan.salt_bytes, keys)
        return header, [start, *(coordinator.MessageFromSite(each.site, each) for each in shares)]

    def keep_ahead(self, name: SiteId, message: messages.Keys | messages.Shares) -> bool:
        """Whether this is for another round than the one under way: kept for the next."""
        under_way = self._facts.round
        header = message.header if isinstance(message, messages.Keys) else message.head.header
        if under_way is not None and under_way.header.digest == header:
            return False
        if isinstance(message, messages.Keys):
            self._ahead.keys[name] = message
        else:
            self._ahead.shares[name] = message
        return True

    def keep_next(self, name: SiteId, keys: messages.NextKeys) -> JobEffects:
        """Keep the keys of a site for the round after this one; with those of all survivors, pass them on."""
        stage = self._facts.stage
        if isinstance(stage, coordinator.InRound) and stage.header.digest == keys.header:
            self._ahead.announced[name] = keys
        bundle = self._ahead.bundle(stage) if isinstance(stage, coordinator.Unmasking) else None
        if bundle is None:
            return []
        return [effects.Send(keys.site, bundle) for keys in bundle.keys]

    def at_rest(self) -> list[SiteStatus]:
        """The status of each site that signed the certificate of this release and sent keys ahead: it follows from
        both, and no such site sends it."""
        facts, stage = self._facts, self._facts.stage
        if not isinstance(stage, coordinator.Released):
            return []
        number, found = stage.header.round, stage.certificate
        return [
            SiteStatus(facts.id, name, stage.header.epoch, found.hash, number)
            for name, _ in found.signatures
            if name in self._ahead.keys
        ]

    def take(self, event: coordinator.CoordinatorEvent, at: Moment) -> JobEffects:
        """One event of the round. Raises PeerRefused for what is not legal there.

        Where the round ends with it, its records are dropped: `close` has the values that replace them.
        """
        before = self._facts.stage
        stage, found = coordinator.step(self._hub, before, event, at.now)
        self._facts.stage = stage
        records = [effect.record for effect in found if isinstance(effect, Persist)]
        unsaved, vectors, summed = self._unsaved, self._unsaved.vectors, self._unsaved.with_sum
        if records and isinstance(event, coordinator.Uploaded):
            vectors = (*vectors, event.digest)
        if isinstance(event, coordinator.SumReady):
            summed, self._sum_size = True, event.size
        self._unsaved = effects.AppendRecords((*unsaved.records, *records), vectors, summed)
        changed = type(stage) is not type(before)
        if changed:
            self._count_time(before, at)
        if not changed and all(isinstance(each, Persist | effects.FoldUpload) for each in found):
            return []
        if changed and isinstance(stage, coordinator.Ended):
            self._unsaved = effects.AppendRecords(())
        return [*self.flush(), *self._translated(found, at)]

    def flush(self) -> JobEffects:
        unsaved, self._unsaved = self._unsaved, effects.AppendRecords(())
        return [unsaved] if unsaved.records else []

    def forget(self) -> None:
        """The job ends: batched records are not needed any more."""
        self._unsaved = effects.AppendRecords(())

    def _translated(
        self, found: Collection[coordinator.CoordinatorEffect], at: Moment
    ) -> JobEffects:
        kept: JobEffects = []
        for effect in found:
            if isinstance(effect, effects.Send) and isinstance(effect.message, messages.Aggregate):
                kept.append(effects.Push(SiteId(effect.to), "sum"))
            if isinstance(effect, effects.RemoveMasks) and self._summing[0] != effect.header.digest:
                self._summing = effect.header.digest, at.now
            # The sum is made of the list: no fold here.
            if isinstance(effect, effects.Send | effects.RemoveMasks | effects.Warn):
                kept.append(effect)
        return kept

    def _count_time(self, before: coordinator.CoordinatorStage, at: Moment) -> None:
        """Add the time since the last change of stage to the stage that ended."""
        name = coordinator.STAGE_NAMES.get(type(before))
        if name is not None:
            spent = self._stage_seconds.get(name, 0.0) + at.now - self._stage_since
            self._stage_seconds[name] = spent
        self._stage_since = at.now

    def submitted(self, name: SiteId, submit: messages.Submit) -> None:
        self._submits[name] = submit

    def arrived(self, name: SiteId, header: bytes, upload: KeptFile) -> bool:
        """A complete upload of a site; False if it is not of the round under way."""
        stage = self._facts.stage
        if not isinstance(stage, coordinator.Waiting) or stage.header.digest != header:
            return False
        self._uploads[name] = upload
        return True

    def to_fold(self, name: SiteId, at: Moment) -> JobEffects:
        """Once signed submission and complete vector are here: fold the vector, then take it.

        A vector that cannot be folded must not be taken, and one that is not taken must not be in the sum: the
        sum is made of the list of taken ones. Raises PeerRefused for a vector that must not be taken.
        """
        event = self.uploaded(name)
        if event is None:
            return []
        coordinator.step(self._hub, self._facts.stage, event, at.now)
        return [effects.StartFold(name, event.digest)]

    def uploaded(self, name: SiteId) -> coordinator.Uploaded | None:
        """The vector of this site with its signed submission; None while one of them is missing."""
        submit, upload = self._submits.get(name), self._uploads.get(name)
        collecting = isinstance(self._facts.stage, coordinator.Collecting)
        if submit is None or upload is None or not collecting:
            return None
        return coordinator.Uploaded(name, submit, upload.digest, upload.size)

    def expects(self, name: SiteId, header: bytes, size: int) -> bool:
        """Whether an upload of `size` bytes may be this site's vector for the round under way."""
        stage = self._facts.stage
        if not isinstance(stage, coordinator.Collecting) or stage.header.digest != header:
            return False
        return name in coordinator.members_of(stage) and size <= stage.size

    def overdue_sum(self, at: Moment) -> JobEffects:
        """A sum that takes longer than a stage may: a worker or the disk hangs."""
        stage, (header, since) = self._facts.stage, self._summing
        if not isinstance(stage, coordinator.Summing) or stage.header.digest != header:
            return []
        seconds = self._facts.limits.stage
        return [effects.FailSum(stage.header, seconds)] if at.now - since > seconds else []

    def summing_late(self, at: Moment) -> bool:
        return at.now - self._summing[1] > self._facts.limits.stage

    def unreleasable(self, at: Moment) -> str:
        """Why a round whose sum may be known ends the job now; empty while it may be released.

        Its timeout for enough sites is that of the start of a job.
        """
        stage, limits = self._facts.stage, self._facts.limits
        if not isinstance(stage, coordinator.EXPOSED):
            self.short_since = None
            return ""
        waited = coordinator.waiting_for(stage)
        away = sum(name not in at.here for name in waited)
        if coordinator.in_sight(stage) - away >= stage.header.threshold:
            self.short_since = None
        elif self.short_since is None:
            self.short_since = at.now
        since = self.short_since
        late = since is not None and at.now - since > limits.enough
        # Sites that have the sum can still release it where this machine lacks it.
        longest = limits.stage + (0.0 if self._sum_lost else limits.enough)
        if not late and at.now - self._stage_since <= longest:
            return ""
        found = f"{_names(waited)} did not come back to release it"
        if self._sum_lost:
            found = f"its sum is not on this machine, and {_names(waited)} did not have it"
        return f"round {stage.header.round} ({stage.header.purpose}): {found}{NO_OTHER_SUM}"

    def without_vectors(self, lost: Collection[SiteId]) -> str:
        """Why the round under way cannot be summed: these vectors are gone, and its list was sent."""
        header = self._facts.round.header if self._facts.round is not None else None
        assert header is not None
        where = f"round {header.round} ({header.purpose})"
        return f"{where}: the vectors of {_names(lost)} are not on this machine"

    def close(self, at: Moment) -> effects.CloseRound:
        """In one commit: the end of the round, its row, and the next step."""
        facts, stage, step = self._facts, self._facts.stage, self._facts.step
        assert facts.plan is not None
        assert step is not None
        assert isinstance(stage, coordinator.Ended)
        released = isinstance(stage, coordinator.Released)
        row = self._row(stage, step, at)
        facts.step = schedule.step_after(facts.plan, facts.features, step, released=released)
        if (
            facts.over
        ):  # this round was announced before enough sites had said so, and none of them joined it
            facts.step = None
        values = {
            "stage": encode(stage), "step": encode(facts.step), **facts.rounds.entry(row)
        }  # fmt: skip
        if isinstance(stage, coordinator.Released):
            values["certificate"] = encode(stage.certificate)
        facts.rounds.known.append(row)
        return effects.CloseRound(values)

    def _row(self, stage: coordinator.Ended, step: schedule.PlannedRound, at: Moment) -> JobRow:
        survivors: tuple[SiteId, ...] = ()
        abandoned: AbandonedRound | None = None
        if isinstance(stage, coordinator.Released):
            survivors = stage.certificate.survivors
        else:
            left, needed = stage.left, stage.header.threshold
            abandoned = AbandonedRound(
                stage=stage.stage, left=left, needed=needed, exposed=stage.exposed
            )
        return JobRow(
            round=step.training_round, purpose=step.purpose, number=stage.header.round,
            seconds=round(at.now - self._begun, 4), survivors=survivors, roster=stage.header.roster,
            seconds_by_stage={n: round(s, 5) for n, s in self._stage_seconds.items()},
            restarted=self._restarted or None,  # the times are those since the restart
            bytes_up=max((upload.size for upload in self._uploads.values()), default=None),
            bytes_down=self._sum_size, abandoned=abandoned,
        )  # fmt: skip

    def tried_enough(self) -> str:
        """Why a step that was abandoned too often ends the job; empty while it is retried."""
        step = self._facts.step
        if step is None:
            return ""
        again = step.purpose, step.training_round
        last = self._facts.rounds.known[-MOST_TRIES:]
        same = [r for r in last if (r.purpose, r.round) == again and r.abandoned is not None]
        if len(same) < MOST_TRIES:
            return ""
        return f"the {step.purpose} round was abandoned {MOST_TRIES} times in a row"

    def sum_is_known(self) -> str:
        """Why no round may follow the one that was abandoned last; empty if one may."""
        stage = self._facts.stage
        if not isinstance(stage, coordinator.Failed) or not stage.exposed:
            return ""
        header = stage.header
        if stage.refused:
            what = f"{_names(stage.refused)} refused the release (the logs of the sites say why)"
        else:
            what = f"only {stage.left} sites could still help to release it, of {header.threshold} it needs"
        return f"round {header.round} ({header.purpose}): {what}{NO_OTHER_SUM}"
