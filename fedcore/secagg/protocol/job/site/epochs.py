"""The key epochs of a job at a site, and the secrets that it holds (PROTOCOL E).

Invariant: the payload of a key epoch is in the journal before its first round, and a round of the previous epoch is
left before that. Erased keys are in no file afterwards (PROTOCOL V).
"""

from fedcore.secagg.protocol import epoch
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.effects import SiteEffects
from fedcore.secagg.protocol.job.site.participation import HeldKeys
from fedcore.secagg.protocol.job.site.rounds import RoundDriver
from fedcore.secagg.protocol.job.site.states import StateKeeper
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.wire_form import encode


class EpochDriver:
    """One job's key epochs at one site."""

    def __init__(self, rounds: RoundDriver, keys: HeldKeys, states: StateKeeper) -> None:
        self._rounds, self._keys, self._states = rounds, keys, states
        self.stage: epoch.SiteEpochStage = epoch.NoKey()

    def step(self, event: epoch.SiteEpochEvent, now: float) -> SiteEffects:
        """Step the machine of key epochs, and carry out its effects, records first."""
        after, found = epoch.step_site(self._rounds.member, self.stage, event)
        for effect in found:
            if isinstance(effect, effects.Persist):
                yield effects.PutValues({"epoch": encode(effect.record)})
        self.stage = after
        for effect in found:
            match effect:
                case effects.Send() | epoch.MakeSecrets():
                    yield effect
                case epoch.Install():
                    yield from self._installed(effect, now)

    def restored(self, stage: epoch.SiteEpochStage) -> None:
        self.stage = stage
        if isinstance(stage, epoch.Holding):
            self._keys.use(stage.payload, stage.header.maker)

    def install_held(self, now: float) -> SiteEffects:
        """Start the key epoch that the process held, but had not started, when it ended."""
        held = self.stage
        if isinstance(held, epoch.Holding) and held.epoch > self._rounds.standing.epoch:
            install = epoch.Install(held.epoch, held.held.key_id, held.payload)
            yield from self._installed(install, now)

    def _installed(self, install: epoch.Install, now: float) -> SiteEffects:
        """Start a key epoch; a round of the previous one is left."""
        rounds = self._rounds
        newer = install.epoch > rounds.standing.epoch
        if newer and rounds.in_round:
            yield from rounds.step(site.Superseded(), now)
        assert isinstance(self.stage, epoch.Holding)
        secrets = self._keys.use(install.payload, self.stage.header.maker)
        if newer:
            yield from self._states.learn_group(install.epoch, secrets.group, installed=True)
            yield from rounds.step(site.NewEpoch(install.epoch, install.key_id), now)
            yield from rounds.keep_stage(rounds.stage)
        yield from rounds.send_status()

    def erase(self) -> SiteEffects:
        if isinstance(self.stage, epoch.NoKey) and not self._states.groups:
            return
        yield effects.EraseKeys()
        self.stage = epoch.NoKey(self.stage.epoch)
        self._keys.secrets, self._states.groups = None, {}
        yield effects.Info(f"job {self._rounds.part.job}: its keys are erased here")
