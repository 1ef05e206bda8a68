"""Everything both roles of a round must agree on: the plan of a job, what its vectors hold, a round's header.

Invariant: a plan without a proof of headroom cannot be made (`packing.py`).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property

from fedcore.errors import BadInput, PlanRefused, UnknownName
from fedcore.secagg import algorithms, protections
from fedcore.secagg.judge_plan import JudgePlan
from fedcore.secagg.packing import Packing, Ring
from fedcore.secagg.privacy import metric_noise
from fedcore.secagg.privacy.beside import refuse_beside_privacy
from fedcore.secagg.privacy.privacy_plan import NoiseGrid, PrivacyPlan, solve_grid
from fedcore.secagg.protections import Protection, has_lattice
from fedcore.secagg.site_groups import GroupPlan
from fedcore.types import Json, SiteId

PLAN_VERSION = 2

SALT_BYTES = 32
"""The fresh salt of every vector under `keystream`; it travels beside the vector."""

WEIGHT = "weight"
"""The sum of the weights of the updates in a sum; one for each group where a plan has groups."""

EXCEEDS = "exceeds"
"""The mark of a site of which more coordinates exceed the range than the range rule tolerates."""

WEIGHT_STEPS = 32
"""A weight is a multiple of max_examples / 32: two sums then show an absent site's rows to 3 % of the cap."""

METRIC, MATRIX = "metric:", "matrix:"
"""How the name of a metric's sums begins, among the wide integers of a vector: of one number, or of a matrix, which
is never made public."""

MOST_PUBLIC_METRICS, MOST_METRIC_NAME = 64, 64
"""Of a plan that makes its metrics public: how many, and characters of a name on a screen."""

STANDARDISE = ("ranges", "federated")
"""What a table's numbers are scaled by; nothing travels for "ranges"."""

TAG_BITS = 61
"""The sum tag is an element of the prime field of 2^61 - 1."""


@dataclass(frozen=True)
class Wide:
    """`count` integers in [0, 2^bits) carried beside the model in b-bit limbs (PROTOCOL W)."""

    name: str
    count: int
    bits: int

    @property
    def metric(self) -> str:
        """The metric whose sums these are among a task's metrics; "" for one that is no single number."""
        return "" if self.name.startswith(MATRIX) else self.name.removeprefix(METRIC)


INITIAL_PARTS = ("parameters", "frozen parameters", "buffers that stay")
"""Of a model: what travels, and what every site must make alike, since it never does."""


@dataclass(frozen=True)
class ModelShape:
    """What a task and its columns fix of a plan; sites of one federation must find the same.

    features: table columns that are standardised, 0 for rows without. inputs: as in ModelPlan. initial: SHA-256
    hex of each of INITIAL_PARTS of the model that the job begins with; empty where one process makes it.
    """

    task: str
    task_digest: str
    parameters: int
    buffer_coordinates: int
    features: int
    inputs: str
    metric_sums: tuple[Wide, ...]
    initial: tuple[str, ...] = ()

    @property
    def model(self) -> ModelPlan:
        """What a plan states of it."""
        joined = "".join(self.initial).encode()
        return ModelPlan(self.inputs, hashlib.sha256(joined).hexdigest() if joined else "")

    def initial_differs(self, other: ModelShape) -> str:
        """In which of INITIAL_PARTS two shapes differ, in words; empty unless it is all they differ in."""
        if replace(self, initial=other.initial) != other or len(self.initial) != len(other.initial):
            return ""
        pairs = zip(INITIAL_PARTS, self.initial, other.initial, strict=False)
        return " and ".join(part for part, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True)
class VectorSpec:
    """What one protected vector holds: d quantised coordinates, wide integers, marks, in this order.

    purpose: "statistics", "range", "update" or "metrics". marks: names of values 0 or 1, of which each
    site of the roster has a place of its own in the sum, so that no site can set another's.
    """

    purpose: str
    coordinates: int
    wides: tuple[Wide, ...] = ()
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class RangePlan:
    """PROTOCOL Q. start None: one calibration over 24 powers of two before round 1."""

    start: float | None = None
    lowest: float = 2.0**-20
    highest: float = 2.0**10
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.start is not None and not self.lowest <= self.start <= self.highest:
            raise BadInput(
                f"protect.range: found {self.start}, expected {self.lowest:g} to {self.highest:g}"
            )


LR_SCHEDULES = ("constant", "cosine", "linear", "exponential", "step")


@dataclass(frozen=True)
class TrainPlan:
    """Local training: one optimiser, its step size and its budget per round.

    proximal_mu: mu of FedProx's term mu/2 |w - w_global|^2 (Li et al. 2020, arXiv:1812.06127, section 3.2);
    0: none. max_grad_norm: largest L2 norm of a batch's whole gradient; None: any. lr_schedule, lr_decay,
    lr_step_rounds, warmup_rounds: how `lr` changes over the rounds (`learning.schedules.learning_rate`).
    initial: SHA-256 hex of the released model that a simulation begins with, as a run prints it; "" for the one
    that every site makes from the seed. algorithm: one of `algorithms.ALGORITHMS`. feddyn_alpha: alpha of FedDyn.
    ditto_lambda: lambda of Ditto. local_parameters: names or patterns of what stays at each site (FedPer, FedBN).
    frozen_parameters: names or patterns of what is neither trained nor sent: every site has it from the same seed.
    privacy: of a job whose sums have noise in them: each vector is then the sum of clipped gradients of the site's
    training rows, and a round is one step (or, where the unit is a site, its clipped update); None without.

    Raises BadInput for a decay without a schedule that uses it, and the reverse, and as `algorithms.refuse_training`.
    """

    optimiser: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0
    epochs: int = 1
    batch_size: int = 32
    proximal_mu: float = 0.0
    max_grad_norm: float | None = None
    lr_schedule: str = "constant"
    lr_decay: float = 1.0
    lr_step_rounds: int | None = None
    warmup_rounds: int = 0
    initial: str = ""
    algorithm: str = "averaging"
    feddyn_alpha: float = 0.01
    ditto_lambda: float = 0.1
    local_parameters: tuple[str, ...] = ()
    frozen_parameters: tuple[str, ...] = ()
    privacy: PrivacyPlan | None = None

    def __post_init__(self) -> None:
        for names in ("local_parameters", "frozen_parameters"):
            object.__setattr__(self, names, tuple(getattr(self, names)))  # of JSON
        algorithms.refuse_training(self, UNCHANGED_TRAINING)
        if self.lr_schedule not in LR_SCHEDULES:
            raise UnknownName("train.lr_schedule", self.lr_schedule, LR_SCHEDULES)
        decays, schedule = self.lr_schedule in {"exponential", "step"}, self.lr_schedule
        if decays and self.lr_decay == 1.0:
            raise BadInput(
                f"train.lr_decay: found none, expected a factor below 1 for lr_schedule {schedule!r}",
                remedy="lr_decay = 0.5 halves the rate at each step",
            )
        if schedule == "step" and self.lr_step_rounds is None:
            raise BadInput(
                "train.lr_step_rounds: found none, expected the rounds between two steps of the rate",
                remedy='lr_step_rounds = 10, or lr_schedule = "exponential" for a step every round',
            )
        if not decays and self.lr_decay != 1.0:
            raise BadInput(
                f"train.lr_decay: found {self.lr_decay} with lr_schedule {schedule!r}, which has no decay",
                remedy='lr_schedule = "exponential" or "step"; lr_decay = 1 is none',
            )

    @property
    def keeps(self) -> str:
        """What a site keeps from round to round and never sends, in words; "" for nothing."""
        return algorithms.keeps_of(self)

    @property
    def personal(self) -> bool:
        """Whether a site uses a model of its own."""
        return algorithms.is_personal(self)


CORRECTIONS = ("adam", "none", "flower")
"""What a server optimiser divides its moments by: `adam`, each by 1 - beta^t; `none`, nothing (Reddi et al. 2021,
algorithm 2); `flower`, the rate alone, as the FedAdam of flwr does, with the powers of the round after."""


@dataclass(frozen=True)
class ServerPlan:
    """The server optimiser, which runs at the sites on the released sum (PROTOCOL F), and what else they make of it.

    momentum: of FedAvgM. beta1, beta2, tau: of FedAdam, FedYogi and FedAdagrad, as in Reddi et al. 2021
    (arXiv 2003.00295), algorithm 2. correction: one of `CORRECTIONS`, of the moments' bias towards 0 in the
    first rounds. judge: by what released models are judged; None: nobody does. groups: of sites whose updates are a sum
    of their own, for their trimmed mean; None: one sum over all. cohort: how many of the sites each round is of; 0 for
    all of them; in simulations only.
    """

    optimiser: str = "fedavg"
    lr: float = 1.0
    momentum: float = 0.9
    buffers: str = "average"
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    correction: str = "adam"
    judge: JudgePlan | None = None
    groups: GroupPlan | None = None
    cohort: int = 0

    def __post_init__(self) -> None:
        if self.correction not in CORRECTIONS:
            raise UnknownName("round.server_correction", self.correction, CORRECTIONS)


def default_threshold(sites: int) -> int:
    """t = floor(2n/3) + 1: two thirds of the sites and one more (n = 1: the only one)."""
    return min(sites, 2 * sites // 3 + 1)


def check_threshold(threshold: int, sites: int) -> int:
    """The threshold, or PlanRefused outside (n/2, n]: two disjoint halves could both open a sum."""
    if not sites < 2 * threshold <= 2 * sites:
        raise PlanRefused(
            f"protect.threshold: found {threshold} for {sites} sites, expected "
            f"{sites // 2 + 1} to {sites}",
            remedy=f"leave it out for the default, {default_threshold(sites)}",
        )
    return threshold


_UNSTATED = {
    "public_metrics": False, "release": "sites", "settings": "", "standardise": "ranges", "initial_parts": "",
    "judge": None, "groups": None, "cohort": 0,
}  # fmt: skip
"""Values that a plan's JSON leaves out: with them nothing more travels or is shown."""

UNCHANGED_TRAINING: Json = {
    "proximal_mu": 0.0, "max_grad_norm": None, "lr_schedule": "constant", "lr_decay": 1.0,
    "lr_step_rounds": None, "warmup_rounds": 0, "initial": "", "algorithm": "averaging", "feddyn_alpha": 0.01,
    "ditto_lambda": 0.1, "local_parameters": (),
    "frozen_parameters": (), "privacy": None,
}  # fmt: skip
"""Values of a TrainPlan that are left out where they travel: a job without these settings has the same digest
as before there were any."""


UNCHANGED_SERVER: Json = {"beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "correction": "adam"}
"""The same of a ServerPlan."""


def without_unchanged(settings: Json, unchanged: Json) -> Json:
    """Settings as they travel: without the later ones that change nothing."""

    def plain(value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    return {n: v for n, v in settings.items() if n not in unchanged or unchanged[n] != plain(v)}


@dataclass(frozen=True)
class ModelPlan:
    """What must be the same at every site before training, as digests.

    inputs: of how raw columns become inputs (names, ranges, categories, order), or "".
    initial: SHA-256 hex over `ModelShape.initial`: parameters and buffers that do not travel are not in a state,
    and would differ between sites unnoticed; "" for a plan of one process.
    """

    inputs: str = ""
    initial: str = ""


@dataclass(frozen=True)
class RoundPlan:
    """The one record both roles share; its digest is in the header of every protected vector.

    threshold: t, the sites a round needs at every stage; 0 becomes the default for `sites`.
    public_metrics: whether the sites send the coordinator the metrics of each certified release over all
    its sites; never under `encrypted`.
    release: whether the sites give the coordinator the model of the last round; never under `encrypted`.
    settings: SHA-256 hex of all settings of the job (`config.settings_digest`), so that whatever decides
    which rows train, how, and what is released is in every header, state tag and signature (PROTOCOL J);
    "" for a plan that no job made.
    standardise: what a table's numbers are scaled by: their public ranges ("ranges", nothing travels), or
    statistics over the sites' training rows ("federated").
    cipher: what encrypts vectors under `encrypted` and `layered`; without effect elsewhere.
    model: what the sites' models have in common beside their parameters.
    """

    task: str
    task_digest: str
    sites: tuple[SiteId, ...]
    protection: str
    packing: Packing
    parameters: int
    buffer_coordinates: int
    max_examples: int
    rounds: int
    train: TrainPlan
    server: ServerPlan
    range: RangePlan
    metric_sums: tuple[Wide, ...] = ()
    threshold: int = 0
    public_metrics: bool = False
    release: str = "sites"
    settings: str = ""
    standardise: str = "ranges"
    cipher: str = "bfv"
    model: ModelPlan = ModelPlan()

    def __post_init__(self) -> None:
        if len(self.sites) != len(set(self.sites)):
            raise BadInput("sites: found the same site id twice, expected distinct ids")
        if self.server.cohort > len(self.sites):
            raise BadInput(
                f"round.cohort: found {self.server.cohort}, expected at most the {len(self.sites)} sites that "
                "there are",
                remedy="leave it out for rounds of all sites",
            )
        protections.refuse_roster(self.per_round, self.protection)
        protections.refuse_cipher(self.protection, self.cipher)
        self._check_ring()
        if not self.threshold:
            object.__setattr__(self, "threshold", default_threshold(self.per_round))
        check_threshold(self.threshold, self.per_round)
        if self.per_round > self.packing.max_sites:
            raise PlanRefused(
                f"sites: found {self.per_round}, expected at most protect.max_sites = "
                f"{self.packing.max_sites}",
                remedy=f"set protect.max_sites to {self.per_round} or more",
            )
        if self.public_metrics:
            protections.refuse_public_metrics(self.protection)
            self._check_names()
        protections.refuse_release(self.release, self.protection)
        algorithms.refuse_server(self.train, self.server)
        if len(self.blocks) > 1 and self.layers.protects:
            algorithms.refuse_threshold(self.threshold, self.per_round)
        if self.standardise not in STANDARDISE:
            raise UnknownName("train.standardise", self.standardise, STANDARDISE)
        if self.server.judge is not None:
            self._check_judge(self.server.judge)
        if self.server.groups is not None:
            self._check_groups(self.server.groups)
        if self.privacy is not None:
            refuse_beside_privacy(self, self.privacy)
            self._check_privacy(self.privacy)

    def _check_groups(self, found: GroupPlan) -> None:
        """Raise PlanRefused for groups that are not those of the roster, and for rules that need the mean of all."""
        if sorted(site for group in found.groups for site in group) != sorted(self.sites):
            raise PlanRefused(
                "groups: found other sites than on the roster, expected each of it once"
            )
        rules = algorithms.algorithm_of(self.train.algorithm)
        if rules.second_block or rules.plain_mean:
            raise PlanRefused(
                f"round.aggregate: found 'trimmed' with the algorithm {rules.name!r}, expected 'mean': its server step "
                "is of the mean over all sites",
                remedy='algorithm = "averaging" or "ditto", with any server optimiser',
            )

    def _check_judge(self, judge: JudgePlan) -> None:
        """Raise PlanRefused where what is judged, or its result, is not what a person would expect."""
        if judge.goes_back and self.train.keeps:
            raise PlanRefused(
                "round.judge: found a plan that may go back to an earlier model while each site keeps "
                f"{self.train.keeps} of the last one, expected patience alone",
                remedy="leave keep and veto out, or use an algorithm under which sites keep nothing",
            )
        protections.refuse_judge(self.protection, ends=judge.ends)

    def with_privacy(self, privacy: PrivacyPlan) -> RoundPlan:
        """This plan, with noise in its sums and the range that goes with it. Raises PlanRefused."""
        refuse_beside_privacy(self, privacy)
        sums = self.metric_sums
        if privacy.metric_share:
            sums = metric_noise.with_room(sums, privacy, self.threshold)
        train, private = replace(self.train, privacy=privacy), self._private_range(privacy)
        return replace(self, train=train, range=private, metric_sums=sums)

    def _check_privacy(self, privacy: PrivacyPlan) -> None:
        """Raise PlanRefused where noise, range and room do not go together."""
        expected = self._private_range(privacy)
        if self.range != expected:
            raise PlanRefused(
                f"range: found {self.range.start}, expected {expected.start}, the fixed one of the noise's grid"
            )

    @cached_property
    def noise_grid(self) -> NoiseGrid:
        """The grid of the vectors of a plan with privacy. Raises PlanRefused."""
        assert self.privacy is not None
        return self._grid(self.privacy)

    @cached_property
    def metric_noise(self) -> dict[str, metric_noise.MetricNoise]:
        """{name of a metric's sums: the noise in them}; empty where they have none."""
        if self.privacy is None:
            return {}
        return metric_noise.noise_of(self.metric_sums, self.privacy, self.threshold)

    def _grid(self, privacy: PrivacyPlan) -> NoiseGrid:
        return solve_grid(
            privacy, coordinates=self.coordinates, threshold=self.threshold,
            units=privacy.most_units(self.max_examples), bits=self.packing.bits,
        )  # fmt: skip

    def _private_range(self, privacy: PrivacyPlan) -> RangePlan:
        """The fixed range whose steps are those of the grid, where a site's vector is its clipped sum times
        `PrivacyPlan.scale`: the mean of these over the sites is the step, divided by a number that is public."""
        # Metrics ride in every round at most, and once after it.
        riding = 2 * sum(wide.count for wide in self.metric_sums) if privacy.metric_share else 0
        privacy.check(
            rounds=self.rounds, threshold=self.threshold, sites=self.per_round, max_examples=self.max_examples,
            values=(self.coordinates + riding) * self.per_round,
        )  # fmt: skip
        step = (
            privacy.clip
            * privacy.scale(self.train.lr, self.max_examples)
            / self._grid(privacy).clip_units
        )
        start = step * ((1 << (self.packing.bits - 1)) - 1)
        return RangePlan(start, min(start, 2.0**-20), max(start, 2.0**10), adaptive=False)

    def _check_ring(self) -> None:
        """The packing has a ring exactly where vectors are ciphertexts of one."""
        lattice = has_lattice(self.protection, self.cipher)
        if lattice != (self.packing.ring is not None):
            raise PlanRefused(
                f"packing: found {'no ring' if lattice else 'a ring'} under {self.protection!r} with the "
                f"cipher {self.cipher!r}, expected {'one' if lattice else 'none'}",
                remedy="`fedcore plan` solves a packing for the plan's protection and cipher",
            )

    def _check_names(self) -> None:
        """Names that are to be shown are few, short and of characters that a terminal shows."""
        names = self.metrics
        fits = all(1 <= len(name) <= MOST_METRIC_NAME and name.isprintable() for name in names)
        if not fits or not 1 <= len(names) <= MOST_PUBLIC_METRICS:
            raise PlanRefused(
                f"track.public_metrics: found {len(names)} metrics, expected 1 to "
                f"{MOST_PUBLIC_METRICS}, each named by 1 to {MOST_METRIC_NAME} printable characters",
                remedy="name fewer or shorter metrics in the task, or leave public_metrics out",
            )

    @property
    def layers(self) -> Protection:
        return Protection.of(self.protection)

    @property
    def per_round(self) -> int:
        """n: how many sites a round invites."""
        return self.server.cohort or len(self.sites)

    @property
    def privacy(self) -> PrivacyPlan | None:
        """`TrainPlan.privacy`."""
        return self.train.privacy

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the task's metrics that are one number, the first one first."""
        return tuple(wide.metric for wide in self.metric_sums if not wide.name.startswith(MATRIX))

    @property
    def model_coordinates(self) -> int:
        """d: parameters and the floating buffers that travel with them."""
        return self.parameters + self.buffer_coordinates

    @property
    def blocks(self) -> dict[str, int]:
        """{what an update vector holds of a site, in words: its coordinates}, in their order."""
        second = algorithms.algorithm_of(self.train.algorithm).second_block
        return {"the update": self.model_coordinates} | (
            {second: self.parameters} if second else {}
        )

    @property
    def coordinates(self) -> int:
        """Of an update vector: those of all its blocks."""
        return sum(self.blocks.values())

    @property
    def count_bits(self) -> int:
        """L of a count over one site's coordinates."""
        return max(1, self.coordinates.bit_length())

    @property
    def weight_bits(self) -> int:
        """L of a weight or of a number of rows, at most max_examples."""
        return self.max_examples.bit_length()

    @property
    def salt_bytes(self) -> int:
        """Bytes of the salt that travels with every vector: 32 under `keystream`, else 0."""
        encrypts = self.layers.encrypts
        return SALT_BYTES if encrypts and not has_lattice(self.protection, self.cipher) else 0

    @property
    def weight_step(self) -> int:
        """Weights are multiples of it, so that they hardly show a site's number of rows (PROTOCOL H)."""
        return max(1, self.max_examples // WEIGHT_STEPS)

    def weight_of(self, rows: int) -> int:
        """The weight of an update from `rows` training rows: the nearest step, at least one, and at most
        max_examples. Every arm that weights by rows uses it."""
        step = self.weight_step
        return step * min(max(1, (rows + step // 2) // step), self.max_examples // step)

    @cached_property
    def update_vector(self) -> VectorSpec:
        """A round's vector: the update, then its weight, the range counts, the metric sums of the
        model it started from, and a mark of each site whose update exceeds the range."""
        own = (
            Wide(WEIGHT, 1, self.weight_bits),
            Wide("over_range", 1, self.count_bits),
            Wide("over_half_range", 1, self.count_bits),
        )
        return VectorSpec("update", self.coordinates, own + self.metric_sums, (EXCEEDS,))

    @cached_property
    def range_vector(self) -> VectorSpec:
        """The calibration before round 1: how many coordinates exceed each of 24 powers of two."""
        return VectorSpec("range", 0, (Wide("exceeding", 24, self.count_bits),))

    @cached_property
    def metrics_vector(self) -> VectorSpec:
        """The metrics-only round after the last one (PROTOCOL W)."""
        return VectorSpec("metrics", 0, self.metric_sums)

    def to_json(self) -> Json:
        """The plan as plain JSON, the form whose digest is signed and printed.

        It has `cipher` only where vectors are encrypted, and the fields of `_UNSTATED`,
        `UNCHANGED_TRAINING` and `UNCHANGED_SERVER` only with another value than there.
        """
        flat = asdict(self) | {"version": PLAN_VERSION}
        model, server = flat.pop("model"), flat["server"]
        flat |= {name: server.pop(name) for name in ("judge", "groups", "cohort")}
        flat |= {"inputs": model["inputs"], "initial_parts": model["initial"]}
        flat["sites"], flat["metric_sums"] = list(flat["sites"]), list(flat["metric_sums"])
        flat["train"] = without_unchanged(flat["train"], UNCHANGED_TRAINING)
        flat["server"] = without_unchanged(server, UNCHANGED_SERVER)
        left_out = {name for name, value in _UNSTATED.items() if flat[name] == value}
        if not self.layers.encrypts:
            left_out.add("cipher")
        return {name: value for name, value in flat.items() if name not in left_out}

    @classmethod
    def from_json(cls, value: Json) -> RoundPlan:
        """The inverse of `to_json`, with every proof made again. Raises BadInput for another version or form,
        and PlanRefused."""
        try:
            fields = dict(value)
            if fields.pop("version") != PLAN_VERSION:
                raise ValueError
            packing = dict(value["packing"])
            ring, privacy = packing["ring"], value["train"].get("privacy")
            judge, groups, cohort = (
                fields.pop(name, _UNSTATED[name]) for name in ("judge", "groups", "cohort")
            )
            private = None if privacy is None else PrivacyPlan(**privacy)
            parts = {
                "sites": tuple(value["sites"]),
                "packing": Packing(**packing | {"ring": Ring(**ring) if ring else None}),
                "train": TrainPlan(**value["train"] | {"privacy": private}),
                "server": ServerPlan(
                    **value["server"],
                    judge=None if judge is None else JudgePlan(**judge),
                    groups=None if groups is None else GroupPlan(**groups),
                    cohort=cohort,
                ),
                "range": RangePlan(**value["range"]),
                "metric_sums": tuple(Wide(**wide) for wide in value["metric_sums"]),
                "model": ModelPlan(fields.pop("inputs"), fields.pop("initial_parts", "")),
            }
            return cls(**fields | parts)
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"plan: found one that is not of version {PLAN_VERSION}") from error

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(canonical(self.to_json())).hexdigest()


def canonical(value: Json) -> bytes:
    """The one byte form of a JSON object: sorted keys, no spaces, UTF-8, shortest round-trip floats."""
    return _CANONICAL(value).encode()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True)
class RoundHeader:
    """What one protected vector belongs to. `digest` is h of the protocol.

    round: the protocol's own counter, strictly increasing at every site, abandoned rounds included.
    training_round: the round of training a person counts; 0 before the first.
    purpose: what the vector holds, so that two vectors of one training round never share keys.
    roster: every site that may contribute; the survivors are known only after the tags are made.
    pins: digest over the roster's pinned identity keys. certificate: hash of the release certificate
    of the last released round, "" before the first.
    """

    federation: str
    job: str
    epoch: int
    round: int
    training_round: int
    purpose: str
    roster: tuple[SiteId, ...]
    pins: str
    threshold: int
    protection: str
    plan_digest: str
    certificate: str = ""
    version: int = PLAN_VERSION

    @cached_property
    def digest(self) -> bytes:
        """h: 32 bytes."""
        about = {each.name: getattr(self, each.name) for each in fields(self)}
        return hashlib.sha256(canonical(about)).digest()

    @property
    def layers(self) -> Protection:
        return Protection.of(self.protection)

    def place(self, site: SiteId) -> int:
        """The site's index in the roster. Raises ValueError for one that is not on it."""
        return self.roster.index(site)
