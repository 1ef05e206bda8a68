"""The end of training before its last round, which the sites find in the metrics of a release and the coordinator does
not see.

Invariant: it is believed once as many sites as the threshold say so of the last release, which is more than half of the
roster. All honest ones say the same, so fewer liars than that cannot end a job.
"""

from fedcore.errors import HeaderRefused, OutOfOrder
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts
from fedcore.secagg.protocol.job.effects import Info, JobEffects, PutValues
from fedcore.secagg.protocol.job_messages import TrainingOver
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import SiteId

KEY = "over"
"""Of the journal: training is over."""


class EarlyEnd:
    """What sites said of the last release since this process started."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._said: set[SiteId] = set()
        self._of = ""
        """The certificate of which they said it."""

    def take(self, site: SiteId, message: TrainingOver) -> JobEffects:
        """A site's word. Raises HeaderRefused (fault: site) under a plan whose training cannot end early, and
        OutOfOrder for another release than the last."""
        facts, plan, certificate = self._facts, self._facts.plan, self._facts.certificate
        if plan is None or plan.server.judge is None or not plan.server.judge.ends:
            raise HeaderRefused("training", "its end said", "nothing: the plan has none", site)
        if certificate is None or message.certificate != certificate.hash:
            raise OutOfOrder("training", "the end of another release", "of the last one", site)
        if self._of != certificate.hash:
            self._of, self._said = certificate.hash, set()
        self._said.add(site)
        if facts.over or len(self._said) < certificate.header.threshold:
            return []
        facts.over = True
        values = {KEY: b"1"}
        if facts.round is None:
            facts.step = None
            values["step"] = encode(None)
        round_ = certificate.header.training_round
        return [
            PutValues(values),
            Info(f"training ends after round {round_}: the sites judged the models"),
        ]
