"""What a site computes for one round: its protected vector, and the state that an opened sum leads to.

Nothing is read or written here, so that it can run in a thread.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedcore.learning.state import JobState, without_metrics
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.label import Terms, collusion
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import effects
from fedcore.secagg.protocol.job.site.events import CheckedSum
from fedcore.secagg.protocol.job.site.participation import Agreed
from fedcore.secagg.protocol.job.site.states import led_to
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.scheme import EpochSecrets, announced, layout_of
from fedcore.types import Contribution, SiteId

LOG = logging.getLogger("fedcore.site.job")


@dataclass(frozen=True)
class RoundWork:
    """One site's computations for the rounds of one job, from one state and under one key epoch.

    few_sites: whether the job allows statistics of columns that few sites have.
    """

    site: SiteId
    agreed: Agreed
    secrets: EpochSecrets
    state: JobState
    few_sites: bool = False

    def layout(self, header: RoundHeader) -> Layout:
        """How the vectors of a round are laid out."""
        return layout_of(self.agreed.plan, self.agreed.features, header.purpose)

    def without_isolating_metrics(self, found: Contribution, header: RoundHeader) -> Contribution:
        """Zero the metric sums where this cohort, with an earlier release, would isolate fewer sites than two honest
        ones (PROTOCOL H). All sites decide alike, since state and cohort are the same."""
        plan = self.agreed.plan
        if not self.state.isolates(header.roster, 2 + collusion(Terms.of_plan(plan)).active):
            return found
        LOG.info(
            "job %s: no metrics in round %s: they would isolate a site", header.job, header.round
        )
        return found[0], without_metrics(plan, found[1])

    def prepare(self, header: RoundHeader) -> None:
        """Do now what the next vector like that of this round needs, whatever it holds."""
        self.secrets.prepare(self.layout(header).slots)

    def protect(
        self, asked: effects.MakeVector, found: Contribution
    ) -> tuple[list[bytes], bytes, Mapping[str, int]]:
        """Pack, tag, mask and encrypt a contribution: the chunks of the vector, the salt of its keystream (b"" without
        one), and its integers at this site's own coordinates."""
        layout = self.layout(asked.header)
        slots = layout.pack(*found, asked.header.place(self.site))
        self.secrets.put_tag(slots, layout, asked, self.site)
        chunks, salt = self.secrets.protect(slots, layout, asked, self.site, OsEntropy())
        return chunks, salt, layout.own_marks(found[1])

    def open(
        self, asked: effects.OpenSum, chunks: Iterable[bytes], marks: Mapping[str, int]
    ) -> CheckedSum:
        """Open a sum, check it, and find the state that it leads to, without its bytes. chunks: they may come while
        those before them are decrypted; marks: this site's own.
        Raises ReleaseRefused, TagRefused, ChunkRefused, ImpossibleSum, and Refused for too few sites."""
        header, layout = asked.header, self.layout(asked.header)
        _, opened, sum_mac = self.secrets.open_with_mac(announced(chunks, asked), layout, asked)
        layout.check_own(opened, marks, header.place(self.site))
        state = self.state.after(
            self.agreed.plan, PlannedRound(header.purpose, header.training_round), opened, asked.survivors,
            self.agreed.columns, allow_few_sites=self.few_sites,
        )  # fmt: skip
        found = site.SumOpened(sum_mac, self.secrets.state_mac(header, state.canonical()))
        certificate = led_to(header, asked.survivors, found.sum_mac, found.state_mac)
        wides, sites = dict(opened.wides), len(asked.survivors)
        return CheckedSum(header.digest, found, certificate, state, b"", wides, sites)
