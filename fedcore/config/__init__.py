"""A job: its settings and their checks. One spelling per setting: Python keyword = TOML key = command-line flag.

    defaults  <  the task's own defaults  <  job.toml  <  --set section.key=value and flags / keywords

Invariant: a `Job` is complete and valid; everything after this file reads plain attributes. Errors name
the key with its path, what was found and what was expected, and the nearest key for an unknown one.
"""

import hashlib
import json
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BeforeValidator, Field, ValidationError

from fedcore.config.private_job import require_privacy
from fedcore.config.unsupported import refuse_unsupported
from fedcore.errors import BadInput, UnknownName
from fedcore.files.toml import Section, found_and_expected, read_tables
from fedcore.secagg import algorithms, packing, plan, protections
from fedcore.secagg.encode.pack import limb_count
from fedcore.secagg.judge_plan import ends_early, is_judged, judge_plan, refuse_judge
from fedcore.secagg.privacy import privacy_plan
from fedcore.secagg.privacy.privacy_plan import PrivacyPlan
from fedcore.secagg.site_groups import LEAST_GROUP, group_plan, refuse_groups
from fedcore.types import Json, SiteId


def _from_words(value: Any) -> Any:
    """`--drop 3:submit:va,5:unmask:va` as well as a TOML list."""
    if not isinstance(value, str):
        return value
    return tuple(filter(None, map(str.strip, value.split(","))))


def _path_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


class RunSection(Section):
    """Top level of a job file. Of simulations only: initial, a released model to begin with in place of the seed's;
    device, where models are trained and evaluated; sum, whether sums are made by the whole protocol or added without
    cryptography; executor, how the sites are trained."""

    task: str = "heart"
    seed: int = Field(default=0, ge=0, lt=1 << 62)
    fold: int = Field(default=0, ge=0)
    folds: int = Field(default=5, ge=2)
    initial: Annotated[str | None, BeforeValidator(_path_text)] = None
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    sum: Literal["full", "exact"] = "full"
    executor: Literal["sequential", "batched", "auto"] = "sequential"


class TrainSection(Section):
    """[train]: one site's local training, as `plan.TrainPlan` has it.

    standardise: what a table's numbers are scaled by."""

    optimiser: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    proximal_mu: float = Field(default=0.0, ge=0)
    max_grad_norm: float | None = Field(default=None, gt=0)
    lr_schedule: Literal["constant", "cosine", "linear", "exponential", "step"] = "constant"
    lr_decay: float = Field(default=1.0, gt=0, le=1)
    lr_step_rounds: int | None = Field(default=None, ge=1)
    warmup_rounds: int = Field(default=0, ge=0)
    algorithm: str = "averaging"
    feddyn_alpha: float = Field(default=0.01, gt=0)
    ditto_lambda: float = Field(default=0.1, gt=0)
    local_parameters: Annotated[tuple[str, ...], BeforeValidator(_from_words)] = ()
    frozen_parameters: Annotated[tuple[str, ...], BeforeValidator(_from_words)] = ()
    standardise: Literal["ranges", "federated"] = "ranges"


class ProtectSection(Section):
    """[protect]: how updates are encoded and hidden, and who gets the model."""

    protection: str = "layered"
    threshold: int | None = None
    bits: int = 16
    max_sites: int | None = Field(default=None, ge=1)
    max_examples: int | None = Field(default=None, ge=1, lt=1 << 40)
    range: float | None = Field(default=None, gt=0)
    adaptive_range: bool = True
    single_site_features: bool = False
    release: Literal["sites", "coordinator"] = "sites"
    cipher: Literal["bfv", "keystream"] = "bfv"
    lattice: Literal["standard", "wide"] = "standard"


PRIVATE_BITS = 20
"""protect.bits of a job with privacy that does not set it: a field has room for the rows of a site and its noise."""


class PrivacySection(Section):
    """[privacy]: differential privacy of the training rows, with the noise inside the protected sum; off without
    epsilon.

    epsilon, delta: what all rounds together may cost a unit; protect.bits is then 20 by default. unit: whose data
    that is about: a "record" (one row), a "column" (the rows with one id in the task's group column) or a "site", which
    takes 100 sites or more. clip: the largest L2 norm of a unit's gradient. colluders: sites that may hand over all
    they hold. noise: enough of it in each "sum", or in the vector of each "site". sample_rate: the share of its units
    that a site takes in a round, drawn by itself. metric_share: the part of the budget for the sums of metrics."""

    epsilon: float | None = Field(default=None, ge=privacy_plan.LEAST_EPSILON, le=100)
    delta: float = Field(default=1e-5, gt=0, lt=1)
    unit: Literal["record", "column", "site"] = "record"
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    colluders: int = Field(default=1, ge=0)
    noise: Literal["sum", "site"] = "sum"
    sample_rate: float = Field(default=1.0, ge=privacy_plan.LEAST_SAMPLE_RATE, le=1)
    metric_share: float = Field(default=0.0, ge=0, le=0.9)


# `validate` was a function of pydantic's models before its version 2.
warnings.filterwarnings(
    "ignore", 'Field name "validate" in "(KeptRound|RoundSection)"', UserWarning
)


class KeptRound(Section):
    """Of [round]: how many rounds, and which of their models is the job's.

    validate: share of each site's training rows that no arm trains on, to judge rounds by; keep, patience: the
    round whose model is released, and after how many rounds without a better one a run ends. judge: by what, the rows
    apart ("validation", in one process only), or the metrics that each release opens ("released"); veto: as in
    `JudgePlan`. In one process only: checkpoint_every: after how many rounds the model is kept; cohort: how many sites
    each sum is of, drawn anew for every round, without it all."""

    rounds: int = Field(default=20, ge=1)
    cohort: int | None = Field(default=None, ge=1)
    validate: float | None = Field(default=None, gt=0, lt=1)  # type: ignore[assignment]
    keep: Literal["last", "best"] | None = None
    patience: int | None = Field(default=None, ge=1)
    judge: Literal["validation", "released"] = "validation"
    veto: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    checkpoint_every: int | None = Field(default=None, ge=1)


class RoundSection(KeptRound):
    """[round]: what the sites do with each released sum, who is absent when, and which round is kept.

    In one process only: aggregate, group_sites, trim: the mean of all updates, or the trimmed mean of those of groups
    of at least so many sites, of which `trim` are left out at either end.
    submit_seconds: at a deployed site, no vector is sent before so many seconds after its round was
    announced, and no survey before so many after the offer: else the time tells of rows (PROTOCOL U)."""

    aggregate: Literal["mean", "trimmed"] = "mean"
    group_sites: int = Field(default=LEAST_GROUP, ge=LEAST_GROUP)
    trim: int = Field(default=1, ge=1)
    server: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"] = "fedavg"
    server_lr: float = Field(default=1.0, gt=0)
    server_momentum: float = Field(default=0.9, ge=0, lt=1)
    server_beta1: float = Field(default=0.9, ge=0, lt=1)
    server_beta2: float = Field(default=0.99, ge=0, lt=1)
    server_tau: float = Field(default=1e-3, gt=0)
    server_correction: Literal["adam", "none", "flower"] = "adam"
    buffers: Literal["average", "initial", "local"] = "average"
    submit_seconds: float | None = Field(default=None, gt=0, le=86_400)
    drop: Annotated[tuple[str, ...], BeforeValidator(_from_words)] = ()
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Reference(Section):
    """A value from elsewhere that a metric is held against where pooling is impossible."""

    metric: str
    value: float
    source: str

    def against(self, values: Mapping[str, float | None]) -> Json:
        """The registered value, and the gap to it: positive means that the federation is below it."""
        found = values.get(self.metric)
        gap = None if found is None else self.value - found
        return {**self.model_dump(), "gap": gap}


class TrackSection(Section):
    """[track]: the arms, bootstrap resamples, a value to compare with, and whether metrics are public.

    to: services that get the rows of a run in one process, beside its folder. keep_scores: keep the scores of single
    rows there as well (`experiment/scores.py`)."""

    arms: Annotated[
        tuple[Literal["centralised", "local_only", "federated_float", "federated"], ...],
        BeforeValidator(_from_words),
        Field(min_length=1),
    ] = ("centralised", "local_only", "federated_float", "federated")
    resamples: int = Field(default=1000, ge=0)
    reference: Reference | None = None
    public_metrics: bool = False
    to: Annotated[
        tuple[Literal["mlflow", "wandb", "tensorboard"], ...], BeforeValidator(_from_words)
    ] = ()
    keep_scores: bool = False


SECTIONS: dict[str, type[Section]] = {
    "": RunSection,
    "train": TrainSection,
    "protect": ProtectSection,
    "privacy": PrivacySection,
    "round": RoundSection,
    "track": TrackSection,
}

KEYS: dict[str, str] = {
    key: section for section, model in SECTIONS.items() for key in model.model_fields
}
"""Setting -> its section; setting names are unique across sections."""

SWITCHES = frozenset(
    key for m in SECTIONS.values() for key, f in m.model_fields.items() if f.annotation is bool
)
"""Settings that are on or off: as a flag without a value they are on."""


class Settings(TypedDict, total=False):
    """Every key of a job file as a keyword of `simulate` and `compare`; what each means: docs/jobs.md.

    Any of them may be left out. A whole section is a mapping: `train={"lr": 0.1}`. A test compares the
    keys and their types with the sections above.
    """

    task_settings: Mapping[str, object]
    seed: int
    fold: int
    folds: int
    initial: str | Path | None
    device: Literal["cpu", "cuda", "mps"]
    sum: Literal["full", "exact"]
    executor: Literal["sequential", "batched", "auto"]
    train: Mapping[str, object]
    optimiser: Literal["sgd", "adam", "adamw"]
    lr: float
    momentum: float
    weight_decay: float
    epochs: int
    batch_size: int
    proximal_mu: float
    max_grad_norm: float | None
    lr_schedule: Literal["constant", "cosine", "linear", "exponential", "step"]
    lr_decay: float
    lr_step_rounds: int | None
    warmup_rounds: int
    algorithm: str
    feddyn_alpha: float
    ditto_lambda: float
    local_parameters: Sequence[str] | str
    frozen_parameters: Sequence[str] | str
    standardise: Literal["ranges", "federated"]
    protect: Mapping[str, object]
    protection: str
    threshold: int | None
    bits: int
    max_sites: int | None
    max_examples: int | None
    range: float | None
    adaptive_range: bool
    single_site_features: bool
    release: Literal["sites", "coordinator"]
    cipher: Literal["bfv", "keystream"]
    lattice: Literal["standard", "wide"]
    privacy: Mapping[str, object]
    epsilon: float | None
    delta: float
    unit: Literal["record", "column", "site"]
    clip: float
    colluders: int
    noise: Literal["sum", "site"]
    sample_rate: float
    metric_share: float
    round: Mapping[str, object]
    rounds: int
    cohort: int | None
    validate: float | None
    keep: Literal["last", "best"] | None
    patience: int | None
    judge: Literal["validation", "released"]
    veto: float | None
    aggregate: Literal["mean", "trimmed"]
    group_sites: int
    trim: int
    checkpoint_every: int | None
    server: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"]
    server_lr: float
    server_momentum: float
    server_beta1: float
    server_beta2: float
    server_tau: float
    server_correction: Literal["adam", "none", "flower"]
    buffers: Literal["average", "initial", "local"]
    submit_seconds: float | None
    drop: Sequence[str] | str
    dropout: float
    track: Mapping[str, object]
    arms: Sequence[str] | str
    resamples: int
    reference: Mapping[str, object] | None
    public_metrics: bool
    to: Sequence[str] | str
    keep_scores: bool


@dataclass(frozen=True)
class Job:
    """A complete, valid job. `sites` is empty where the task's own default sites are meant.

    base: the folder relative paths count from: the job file's, or the current one. task_settings: what the job
    sets of the task's own settings; the task checks them, and once it did, they are those that it does not
    have by default.
    """

    run: RunSection = field(default_factory=RunSection)
    train: TrainSection = field(default_factory=TrainSection)
    protect: ProtectSection = field(default_factory=ProtectSection)
    privacy: PrivacySection = field(default_factory=PrivacySection)
    round: RoundSection = field(default_factory=RoundSection)
    track: TrackSection = field(default_factory=TrackSection)
    sites: Mapping[str, object] = field(default_factory=dict)
    base: Path = field(default_factory=Path.cwd)
    task_settings: Mapping[str, object] = field(default_factory=dict)

    def to_json(self) -> Json:
        """Sections as plain JSON, the form `job.json` of a run has."""
        sections = {
            name: getattr(self, name).model_dump(mode="json") for name in filter(None, SECTIONS)
        }
        if (
            self.privacy.epsilon is None
        ):  # a job without privacy has the same digest as before there was any
            del sections["privacy"]
        own = {k: list(v) if isinstance(v, tuple) else v for k, v in self.task_settings.items()}
        of_task = {"task_settings": own} if own else {}
        about = {"base": str(self.base), **of_task}
        return {**self.run.model_dump(mode="json"), **sections, **about}


_OF_SIMULATIONS = {"task", "base", "initial", "device", "sum", "executor"}
_RECORD = {"to", "keep_scores"}


def deployed_settings(job: Job) -> Json:
    """A job without what `fedcore up` does for its own run only: where rows and scores go on this machine."""
    whole = job.to_json()
    return whole | {"track": {k: v for k, v in whole["track"].items() if k not in _RECORD}}


def wire_settings(job: Job) -> Json:
    """What travels of a job: every setting, nothing of this machine's paths, nothing that is unset or is a later
    setting that changes nothing."""
    whole = {k: v for k, v in deployed_settings(job).items() if k not in _OF_SIMULATIONS}
    for section in SECTIONS.keys() & whole.keys():
        whole[section] = {k: v for k, v in whole[section].items() if v is not None}
    later = {f"server_{name}": value for name, value in plan.UNCHANGED_SERVER.items()}
    later |= {"judge": "validation", "aggregate": "mean", "group_sites": LEAST_GROUP, "trim": 1}
    return whole | {
        "train": plan.without_unchanged(whole["train"], plan.UNCHANGED_TRAINING),
        "round": plan.without_unchanged(whole["round"], later),
    }


def read_settings(settings: bytes) -> Json:
    """The inverse of `wire_settings`, from its canonical JSON. Raises BadInput."""
    try:
        found = json.loads(settings)
        same = plan.canonical(found) == settings
    except (ValueError, RecursionError) as error:
        raise BadInput("job: found settings that are no JSON") from error
    if not isinstance(found, dict) or not same:
        raise BadInput("job: found settings in another form, expected canonical JSON")
    refuse_unsupported(found, "deployment")
    return found


def train_plan(section: TrainSection) -> plan.TrainPlan:
    """The plan of local training. Raises BadInput for settings that do not go together."""
    return plan.TrainPlan(**section.model_dump(exclude={"standardise"}))


def server_plan(section: RoundSection) -> plan.ServerPlan:
    """The plan of the server optimiser."""
    return plan.ServerPlan(
        section.server, section.server_lr, section.server_momentum, section.buffers,
        section.server_beta1, section.server_beta2, section.server_tau, section.server_correction,
    )  # fmt: skip


def settings_digest(job: Job, max_examples: int) -> str:
    """SHA-256 hex of a job's canonical settings, with the cap on rows in force (PROTOCOL J).

    It is in the plan, so two sites that were offered different settings find different plans.
    """
    settings = wire_settings(job)
    settings["protect"]["max_examples"] = max_examples
    return hashlib.sha256(plan.canonical(settings)).hexdigest()


def plan_of(
    job: Job, shape: plan.ModelShape, sites: tuple[SiteId, ...], max_examples: int
) -> plan.RoundPlan:
    """The plan that follows from a job, the model and the roster, the same for every party.

    Raises PlanRefused where no packing proves headroom, BadInput for a roster it cannot take.
    """
    protect, each = job.protect, job.round
    train = train_plan(job.train)
    fields = shape.parameters + shape.buffer_coordinates
    if algorithms.algorithm_of(train.algorithm).second_block:
        fields += shape.parameters
    fields += sum(wide.count * limb_count(wide.bits, protect.bits) for wide in shape.metric_sums)
    found = plan.RoundPlan(
        task=shape.task, task_digest=shape.task_digest, sites=sites, protection=protect.protection,
        packing=packing_of(job, each.cohort or len(sites), fields),
        parameters=shape.parameters, buffer_coordinates=shape.buffer_coordinates,
        max_examples=max_examples, rounds=each.rounds,
        train=train,
        server=replace(
            server_plan(each), judge=judge_plan(each, shape.metric_sums),
            groups=group_plan(each, sites, job.run.seed), cohort=each.cohort or 0,
        ),
        range=plan.RangePlan(protect.range, adaptive=protect.adaptive_range),
        metric_sums=shape.metric_sums,
        threshold=protect.threshold or 0,
        public_metrics=job.track.public_metrics, release=protect.release,
        settings=settings_digest(job, max_examples), standardise=job.train.standardise, cipher=protect.cipher,
        model=shape.model,
    )  # fmt: skip
    if job.privacy.epsilon is None:
        return found
    return found.with_privacy(
        PrivacyPlan.asked(job.privacy).calibrated(each.rounds, judged=is_judged(each))
    )


def packing_of(job: Job, sites: int, fields: int | None = None) -> packing.Packing:
    """The packing a job's vectors get in a federation of so many sites. Raises as `solve_packing`."""
    section = job.protect
    return packing.solve_packing(
        section.bits, section.max_sites or sites, section.protection, fields,
        cipher=section.cipher, lattice=section.lattice,
    )  # fmt: skip


def narrowest_policy(job: Job, sites: int) -> Json:
    """[policy] of site.toml that lets this job run on a roster of so many sites, and nothing wider.

    `jobs_per_month`, the guard and `jobs` keep their defaults: no job asks for them.
    """
    threshold = job.protect.threshold or plan.default_threshold(sites)
    return {
        "protections": [job.protect.protection],
        "ciphers": [job.protect.cipher],
        "least_threshold": threshold,
        "minimum_sites": max(protections.MIN_SITES, threshold),
        "most_rounds": job.round.rounds,
        "most_epochs": job.train.epochs,
        "least_batch": job.train.batch_size,
        "public_metrics": job.track.public_metrics,
        "single_site_features": job.protect.single_site_features,
        "statistics": job.train.standardise,
        "release": job.protect.release,
        "task_settings": bool(job.task_settings),
        **({} if job.privacy.epsilon is None else {"most_epsilon": job.privacy.epsilon}),
    }


def is_json(value: Any) -> bool:
    """Whether a source can be written into a job file."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def read_job_file(path: Path) -> Json:
    """The tables of a job file, paths in it made absolute. Raises BadInput."""
    if path.is_dir():
        path = path / "job.toml"
    if not path.is_file():
        raise BadInput(
            f"job file: found no file {path}", remedy="`fedcore new DIR` writes one to start from"
        )
    return {**read_tables(path), "base": str(path.resolve().parent)}


def build_job(*layers: Mapping[str, Any]) -> Job:
    """One job from layers, later ones winning. A layer may be nested like the TOML or flat keywords.

    Raises UnknownName with the nearest key, BadInput with the key's path, or PlanRefused for public
    metrics or a model for the coordinator under `encrypted`, and for a cipher or lattice where the
    protection has none.
    """
    merged: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    sites: dict[str, Any] = {}
    of_task: dict[str, Any] = {}
    base = Path.cwd()
    for layer in layers:
        here = Path(layer.get("base", Path.cwd()))  # what a path in this layer counts from
        for key, value in layer.items():
            if key == "base":
                continue
            if key == "sites":
                sites = _sites_of(value, here)
            elif key.startswith("sites."):
                sites[key.removeprefix("sites.")] = beside(value, here)
            elif key == "task_settings":
                of_task |= _settings_of_task(value)
            elif key.startswith(("task.", "task_settings.")):
                of_task[key.partition(".")[2]] = value
            elif key and key not in KEYS and (key in SECTIONS or isinstance(value, Mapping)):
                _merge_section(merged, key, value)
            else:
                base = here if key == "task" else base
                path = key == "initial" and isinstance(value, str | Path)
                _put(merged, key, str((here / value).resolve()) if path else value)
    if merged["privacy"].get("epsilon") is not None:
        merged["protect"].setdefault("bits", PRIVATE_BITS)
    sections = {name: _validate(name, model, merged[name]) for name, model in SECTIONS.items()}
    protect = sections["protect"]
    protections.refuse_unknown(protect.protection)
    protections.refuse_cipher(protect.protection, protect.cipher, protect.lattice)
    if sections["track"].public_metrics:
        protections.refuse_public_metrics(protect.protection)
    protections.refuse_release(protect.release, protect.protection)
    if protect.release == "coordinator" and sections["round"].buffers == "local":
        raise BadInput(
            "round.buffers: found 'local' with protect.release 'coordinator', expected 'average' or 'initial': the "
            "statistics stay at the sites, so the coordinator's model would have none",
            remedy='release = "sites": each site has the model with its own statistics (`fed-site model`)',
        )
    if protect.release == "coordinator" and sections["train"].local_parameters:
        raise BadInput(
            "train.local_parameters: found some with protect.release 'coordinator', expected none: they stay at the "
            "sites, so the coordinator's model would have those of the seed",
            remedy='release = "sites": each site has the model with its own (`fed-site model`)',
        )
    algorithms.refuse_server(train_plan(sections["train"]), server_plan(sections["round"]))
    refuse_judge(sections["round"], sections["round"].validate)
    refuse_groups(sections["round"])
    run = sections[""]
    if run.fold >= run.folds:
        raise BadInput(f"fold: found {run.fold}, expected 0 to folds - 1 = {run.folds - 1}")
    protections.refuse_judge(protect.protection, ends=ends_early(sections["round"]))
    require_privacy(sections["privacy"], merged["privacy"], protect, sections["round"])
    rest = (sections["privacy"], sections["round"], sections["track"], sites, base, of_task)
    return Job(run, sections["train"], protect, *rest)


def _settings_of_task(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise BadInput(
            f"task_settings: found {type(value).__name__}, expected a table of settings of the task"
        )
    return {str(name): each for name, each in value.items()}


def _sites_of(value: Any, base: Path) -> dict[str, Any]:
    """A number is that of the sites which the task makes itself: `--sites 4`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {"n": value}
    if not isinstance(value, Mapping):
        raise BadInput(
            f"sites: found {type(value).__name__}, expected a mapping of site id to source",
            remedy='sites={"north": "north.csv", ...}, or `id = "source"` lines under [sites]',
        )
    found = {str(name): beside(source, base) for name, source in value.items()}
    if len(found) != len(value):
        raise BadInput("sites: found the same site id twice, expected distinct ids")
    return found


def _merge_section(merged: dict[str, dict[str, Any]], section: str, table: Any) -> None:
    if section not in SECTIONS:
        raise UnknownName("section", section, [name for name in SECTIONS if name] + ["sites"])
    if not isinstance(table, Mapping):
        raise BadInput(f"{section}: found {type(table).__name__}, expected a table of settings")
    for key, value in table.items():
        if KEYS.get(key) != section or not section:
            known = [f"{section}.{name}" for name in SECTIONS[section].model_fields]
            raise UnknownName("key", f"{section}.{key}", known)
        merged[section][key] = value


def _put(merged: dict[str, dict[str, Any]], key: str, value: Any) -> None:
    section, _, name = key.rpartition(".")
    if name not in KEYS or (section and KEYS[name] != section):
        known = [f"{KEYS[k]}.{k}".lstrip(".") if section else k for k in KEYS]
        elsewhere = f"{KEYS.get(name, '')}.{name}".lstrip(".")
        remedy = f"did you mean {elsewhere!r}?" if name in KEYS else ""
        raise UnknownName("key", key, [*known, "sites"], remedy=remedy)
    merged[KEYS[name]][name] = value


def _validate(section: str, model: type[Section], values: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(filter(None, (section, *map(str, first["loc"]))))
        raise BadInput(
            f"{path}: {found_and_expected(first)}",
            remedy=f"`--set {path}=...`, or the key in the job file" if section else "",
        ) from error


def beside(source: Any, base: Path) -> Any:
    """Make a source absolute if it is written like a path (`data/a.csv`, `./north`) and exists below base, the
    job file's folder; any other source is left to the task."""
    if not isinstance(source, str) or not ("/" in source or Path(source).suffix):
        return source
    path = base / source
    return str(path.resolve()) if path.exists() else source


def parse_set(text: str) -> tuple[str, Any]:
    """`train.lr=0.05` to ("train.lr", 0.05); the value is TOML, or a bare word."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise BadInput(
            f"--set: found {text!r}, expected section.key=value", remedy="--set train.lr=0.05"
        )
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
