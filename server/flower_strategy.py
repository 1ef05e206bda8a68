"""`SecureAggregation`: a Flower strategy whose training rounds are protected sums.

A ServerApp calls `start` as it would call the strategy's. Sites answer under the rules of our rounds
(`fedcore/secagg/by_request`); the strategy gets one reply, the weighted mean of all sites, and takes its server step.
The ServerApp learns each released mean and the model, and no update of a single site.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from flwr.superlink.grid import InMemoryGrid

from fedcore.errors import Abandoned, BadInput, FedcoreError, PlanRefused, RoundAbandoned
from fedcore.files.toml import read_tables
from fedcore.learning.flower_apps.refused import refuse_single_updates
from fedcore.secagg.by_request import named_arrays as named
from fedcore.secagg.by_request.coordinator import CoordinatorByRequest, ReleasedRound
from fedcore.secagg.by_request.requests import BODY, RECORD, STYPE, Request, SiteReply
from fedcore.secagg.by_request.simulated import FEDERATION, simulated_identities
from fedcore.secagg.by_request.terms import RunTerms
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.encode.quantise import step_size
from fedcore.secagg.protections import MIN_SITES
from fedcore.secagg.protocol.schedule import PlannedRound, first_step, step_after
from fedcore.types import SiteId

LOG = logging.getLogger("fedcore.coordinator")

_POLL_SECONDS = 0.2

LATE_SECONDS = 60.0
"""How long a run waits for the nodes of its last sites before it begins; they may join later."""


@dataclass(frozen=True)
class RoundReport:
    """One round. survivors: sites in its sum, empty where it was abandoned. upload_bytes: of one site's vector.
    clipped: values of all sites beyond the range, `bound`. rounding: more than any value of the mean update differs,
    by rounding to bits, from the mean of the clipped updates."""

    round: int
    survivors: tuple[SiteId, ...]
    upload_bytes: int = 0
    clipped: int = 0
    bound: float = 0.0
    rounding: float = 0.0


class SecureAggregation:
    """Wrap a strategy: FedAvg, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad, or one derived from them.

    sites: {name: public key in hex} of every site in the order of their own files, or the path of a TOML file with
    them under [sites]. A simulation by `flwr run` uses neither them nor `federation`: its nodes are site-0, site-1,
    ... with keys that follow from their places. None is for an app that is only simulated. max_examples: a public
    cap on one site's weight; weights are rounded to 1/32 of it. protection: "layered" or "masked". value_range:
    largest weighted update that is not clipped; None measures it in a round of its own. metrics: {name: (low, high)}
    of training metrics that are averaged, each clipped to its range; no other metric leaves a site. threshold: sites
    needed at every stage, 0 for two thirds and one. seed: of rounding.

    Raises PlanRefused for a strategy or protection that cannot work, and BadInput.
    """

    def __init__(
        self,
        strategy: FedAvg,
        *,
        max_examples: int,
        sites: Mapping[str, str] | str | Path | None = None,
        federation: str = FEDERATION,
        protection: str = "layered",
        cipher: str = "bfv",
        bits: int = 16,
        value_range: float | None = None,
        threshold: int = 0,
        metrics: Mapping[str, tuple[float, float]] | None = None,
        seed: int = 0,
    ) -> None:
        logging.getLogger("flwr").addFilter(_ONE_LINE)
        _check_strategy(strategy)
        self.strategy, self.max_examples = strategy, max_examples
        self.protection, self.cipher, self.bits = protection, cipher, bits
        self.value_range, self.threshold, self.seed = value_range, threshold, seed
        self.metrics = metrics or {}
        if strategy.weighted_by_key in self.metrics:
            raise BadInput(
                f"metrics: found {strategy.weighted_by_key!r}, which is the weight, expected names of metrics"
            )
        self.federation, self.pins = federation, {} if sites is None else _pins(sites)
        self.history: list[RoundReport] = []

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """All rounds; the arguments and the result are those of `Strategy.start`.

        timeout: seconds that each stage of a round waits for silent sites. A round with too few sites is abandoned:
        the model stays. Raises Refused where too few sites take part in the run, and Abandoned where none of its
        rounds was released or where no other round may follow.
        """
        link = _GridLink(grid, timeout)
        if isinstance(grid, InMemoryGrid):
            self._simulate(link)
        elif not self.pins:
            raise BadInput(
                "sites: found none, expected the public key of every site",
                remedy="the path of a TOML file with the names and keys under [sites]",
            )
        first = _numpy(initial_arrays)
        terms = RunTerms.make(
            self.federation, f"flower-{grid.run.run_id}", tuple(self.pins),
            parameters=named.count(first), layout=named.layout_of_arrays(first), rounds=num_rounds,
            max_examples=self.max_examples, protection=self.protection, cipher=self.cipher, bits=self.bits,
            value_range=self.value_range, threshold=self.threshold, metrics=self.metrics, seed=self.seed,
        )  # fmt: skip
        link.wait_for(len(self.pins), terms.plan.threshold)
        run = CoordinatorByRequest(terms, self.pins, link)
        run.begin()
        result, model = Result(arrays=initial_arrays), first
        self._evaluate(evaluate_fn, 0, result)
        step: PlannedRound | None = first_step(terms.plan, 0)
        while step is not None and step.training_round <= num_rounds:
            config = ConfigRecord() if train_config is None else train_config
            content = self._configured(max(1, step.training_round), model, first, config)
            released = self._round(run, step, content)
            if released is not None and len(released.mean):
                model = self._stepped(terms, released, model, first, result)
                result.arrays = _record(named.cast_like(model, first))
            if step.training_round:
                self._evaluate(evaluate_fn, step.training_round, result)
            elif released is None:
                raise Abandoned(
                    "run: found too few sites to measure the range of updates, expected at least "
                    f"{terms.plan.threshold}",
                    remedy="give `value_range`, or start again with more sites connected",
                )
            step = step_after(terms.plan, 0, step, released=released is not None)
        if not any(report.survivors for report in self.history):
            raise Abandoned(
                f"run: found all {num_rounds} rounds abandoned, expected at least one with "
                f"{terms.plan.threshold} of {len(self.pins)} sites at every stage",
                remedy="see in the SuperNodes' logs why sites left",
            )
        return result

    def _simulate(self, link: _GridLink) -> None:
        """Take the identities of a simulation's nodes. Raises BadInput where they are too few."""
        nodes = link.settled()
        if nodes < MIN_SITES:
            raise BadInput(
                f"simulation: found {nodes} nodes, expected at least {MIN_SITES}",
                remedy="flwr run APP --federation-config 'num-supernodes=4'",
            )
        identities = simulated_identities(nodes)
        self.pins = {site: key.public for site, key in identities.items()}
        self.federation = FEDERATION
        LOG.info(
            "simulation: %s nodes on one machine, with keys that anyone can compute: it protects nobody",
            nodes,
        )

    def _round(
        self, run: CoordinatorByRequest, step: PlannedRound, content: RecordDict
    ) -> ReleasedRound | None:
        digest = named.digest_of_arrays(
            _numpy(content.array_records[self.strategy.arrayrecord_key]),
            dict(content.config_records),
        )
        bound = run.state.bound
        try:
            found = run.round(step, digest, content)
        except RoundAbandoned as error:
            LOG.warning("round %s: %s", step.training_round, error)
            if step.training_round:
                self.history.append(RoundReport(step.training_round, ()))
            return None
        if step.training_round:
            clipped, weight = (found.opened.wides[name][0] for name in ("over_range", "weight"))
            report = RoundReport(
                step.training_round, found.survivors, found.upload_bytes, clipped, bound,
                step_size(self.bits, bound) * len(found.survivors) * self.max_examples / weight,
            )  # fmt: skip
            self.history.append(report)
            LOG.info(
                "round %s: sum of %s released; %s bytes from each site, %s values clipped to %g, rounding below %.2g",
                report.round, ", ".join(report.survivors), report.upload_bytes, clipped, bound, report.rounding,
            )  # fmt: skip
        return found

    def _configured(
        self, number: int, model: named.Arrays, first: named.Arrays, config: ConfigRecord
    ) -> RecordDict:
        """What the strategy sends to train from. It is given the model in float64, as it stepped it last, and every
        site gets it in the types of the initial arrays."""
        nodes = cast(Grid, _AllSites(self.strategy, len(self.pins)))
        sent = list(self.strategy.configure_train(number, _record(model), config, nodes))
        key = self.strategy.arrayrecord_key
        if not sent:
            raise BadInput(
                f"strategy: found no message of configure_train for round {number}, expected one a node"
            )
        if any(
            each.content is not sent[0].content and each.content != sent[0].content for each in sent
        ):
            raise PlanRefused(
                f"strategy: found different messages to nodes in round {number}, expected the same for all",
                remedy="a protected sum is of updates of one model under one configuration",
            )
        kept = {name: record for name, record in sent[0].content.items() if name != key}
        return RecordDict({key: _record(named.cast_like(model, first)), **kept})

    def _stepped(
        self,
        terms: RunTerms,
        released: ReleasedRound,
        model: named.Arrays,
        first: named.Arrays,
        result: Result,
    ) -> named.Arrays:
        """The strategy's server step from the one aggregate."""
        weight = released.opened.wides["weight"][0]
        number = released.step.training_round
        found = terms.metric_means(released.opened)
        for name in sorted(set(terms.metrics) - set(found)):
            LOG.warning(
                "round %s: no metric %r in the sum: no site has it, or its sites differ by few from earlier ones",
                number,
                name,
            )
        means: dict[str, int | float | list[int] | list[float]] = {
            self.strategy.weighted_by_key: weight, **found
        }  # fmt: skip
        content = RecordDict(
            {
                self.strategy.arrayrecord_key: _record(named.moved(model, released.mean)),
                "metrics": MetricRecord(means),
            }
        )
        arrays, metrics = self.strategy.aggregate_train(number, [_reply(content)])
        if metrics is not None:
            result.train_metrics_clientapp[number] = metrics
        if arrays is None:
            raise BadInput(
                f"strategy: found no arrays after round {number}, expected the next model"
            )
        stepped = _numpy(arrays)
        named.require_same(stepped, first, f"strategy, round {number}")
        return {n: stepped[n] if named.travels(kind) else kind for n, kind in first.items()}

    def _evaluate(
        self,
        evaluate: Callable[[int, ArrayRecord], MetricRecord | None] | None,
        number: int,
        result: Result,
    ) -> None:
        found = evaluate(number, result.arrays) if evaluate is not None else None
        if found is not None:
            result.evaluate_metrics_serverapp[number] = found


def _check_strategy(strategy: FedAvg) -> None:
    """Raise PlanRefused for a strategy that cannot take one aggregate, or settings that have no effect here."""
    refuse_single_updates(strategy, "SecureAggregation")
    if not isinstance(strategy, FedAvg):
        kind = type(strategy)
        raise PlanRefused(
            f"strategy: found {kind.__name__} of {kind.__module__}, expected one that is derived from FedAvg of "
            "flwr.serverapp.strategy",
            remedy="use FedAvg, FedProx, FedAvgM, FedAdam, FedYogi or FedAdagrad of flwr.serverapp.strategy",
        )
    if strategy.weighted_by_key != "num-examples":
        raise PlanRefused(
            f"strategy: found weighted_by_key={strategy.weighted_by_key!r}, expected 'num-examples': the "
            "metric by which sites weight their updates"
        )
    if strategy.fraction_train != 1.0:
        raise PlanRefused(
            f"strategy: found fraction_train={strategy.fraction_train:g}, expected 1: every connected site is "
            "in every round"
        )
    if strategy.fraction_evaluate != 0.0:
        raise PlanRefused(
            f"strategy: found fraction_evaluate={strategy.fraction_evaluate:g}, expected 0: evaluation at the "
            "sites is not protected",
            remedy="declare training metrics with `metrics`, or evaluate in the ServerApp (`evaluate_fn`)",
        )


def _pins(sites: Mapping[str, str] | str | Path) -> dict[SiteId, bytes]:
    found = sites if isinstance(sites, Mapping) else read_tables(Path(sites)).get("sites")
    if not isinstance(found, Mapping) or not found:
        raise BadInput(f'sites: found no table [sites] in {sites}, expected name = "public key"')
    try:
        pins = {SiteId(str(name)): bytes.fromhex(str(key)) for name, key in found.items()}
    except ValueError as error:
        raise BadInput(
            "sites: found a key that is no hex, expected 64 hex digits a site",
            remedy="`python -m fedcore_clients.flower_identities` writes such a file",
        ) from error
    roster_digest(pins)
    return pins


def _numpy(record: object) -> named.Arrays:
    """Raises BadInput for anything but an ArrayRecord of finite numbers."""
    if not isinstance(record, ArrayRecord):
        raise BadInput(f"arrays: found {type(record).__name__}, expected an ArrayRecord")
    try:
        found = {str(name): array.numpy() for name, array in record.items()}
    except (TypeError, ValueError) as error:
        raise BadInput(f"arrays: found some that NumPy cannot read ({error})") from error
    for name, array in found.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadInput(
                f"array {name!r}: found NaN or infinity, expected finite numbers",
                remedy="a smaller step of the strategy, or initial arrays without NaN",
            )
    return found


def _record(arrays: named.Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def _reply(content: RecordDict) -> Message:
    """The one reply that the strategy gets."""
    from flwr.app import Metadata
    from flwr.app.message import make_message

    about = Metadata(
        run_id=0, message_id="", src_node_id=0, dst_node_id=0, reply_to_message_id="", group_id="",
        created_at=time.time(), ttl=3600.0, message_type="train",
    )  # fmt: skip
    return make_message(about, content)


class _OneLine(logging.Filter):
    """Flower logs the exception that ended a run with its traceback. Of ours, which are about input and sites, it
    logs what the command line would print."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FedcoreError):
            record.exc_info = None
            hint = f"\nhint: {error.remedy}" if error.remedy else ""
            record.msg, record.args = f"{record.getMessage()}\nerror: {error}{hint}", ()
        return True


_ONE_LINE = _OneLine()


class _AllSites:
    """In place of a grid for a strategy that samples nodes: as many as it asks for, so that it waits for none."""

    def __init__(self, strategy: FedAvg, sites: int) -> None:
        self._count = max(strategy.min_available_nodes, strategy.min_train_nodes, sites)

    def get_node_ids(self) -> Iterable[int]:
        return range(self._count)


class _GridLink:
    """Sites behind a Flower grid. Replies are pulled one by one, so that one vector is in memory at a time."""

    def __init__(self, grid: Grid, timeout: float) -> None:
        if not timeout > 0:
            raise BadInput(f"timeout: found {timeout}, expected seconds above 0")
        self._grid, self._timeout = grid, timeout

    def nodes(self) -> Sequence[Hashable]:
        return list(self._grid.get_node_ids())

    def settled(self) -> int:
        """The number of nodes once it has stayed the same for a second: a simulation starts them beside the run."""
        until = time.monotonic() + self._timeout
        before, there = 0, len(self.nodes())
        while (there != before or not there) and time.monotonic() < until:
            time.sleep(min(1.0, self._timeout))
            before, there = there, len(self.nodes())
        return there

    def wait_for(self, sites: int, least: int) -> None:
        """Wait for the nodes of all sites: a minute where `least` of them are there, else for as long as a stage."""
        began = time.monotonic()
        while (there := len(self.nodes())) < sites:
            waited = time.monotonic() - began
            if waited > self._timeout or (there >= least and waited > LATE_SECONDS):
                return
            time.sleep(min(1.0, self._timeout))

    def ask(
        self, requests: Mapping[Hashable, Request]
    ) -> Iterator[tuple[Hashable, SiteReply | None]]:
        asked = {self._sent(node, request): node for node, request in requests.items()}
        until = time.monotonic() + self._timeout
        while asked and time.monotonic() < until:
            came = False
            for ticket in list(asked):
                for message in self._grid.pull_messages([ticket]):
                    came = True
                    node = asked.pop(ticket)
                    yield node, _reply_of(message, node)
            if asked and not came:
                time.sleep(_POLL_SECONDS)
        for node in asked.values():
            LOG.warning("node %s: no answer within %.0f s", node, self._timeout)
            yield node, None

    def _sent(self, node: Hashable, request: Request) -> str:
        content = RecordDict({RECORD: ConfigRecord(dict(request.parts()))})
        if request.body:
            data = request.body
            body = Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)
            content[BODY] = ArrayRecord({"body": body})
        if request.training is not None:
            for name, record in cast(RecordDict, request.training).items():
                content[name] = record
        message = Message(content, cast(int, node), "train", ttl=self._timeout)
        (ticket,) = self._grid.push_messages([message])
        return ticket


def _reply_of(message: Message, node: Hashable) -> SiteReply | None:
    """node: whom it is of; a SuperLink that lost a message replies itself."""
    if message.has_error():
        return SiteReply(refused=f"node {node}: {message.error.reason}")
    content = message.content
    try:
        body = content.array_records[BODY]["body"].data if BODY in content.array_records else b""
        return SiteReply.of_parts(dict(content.config_records[RECORD]), body)
    except (KeyError, FedcoreError) as error:
        LOG.warning("node %s: its reply is none of ours: %s", node, error)
        return None
