"""Everything of a run before round 1: its settings, its sites and their rows, the model, the plan.

Invariant: nothing is chosen on test rows, and what the plan refuses is refused before a row is loaded.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from fedcore.config import Job, build_job, is_json, packing_of, plan_of
from fedcore.errors import BadInput, TaskFailed, UnknownName
from fedcore.experiment.simulation import Federation, Leaving
from fedcore.files import read_json
from fedcore.identity.peer import check_sites
from fedcore.learning.app_jobs import refuse_of_app
from fedcore.learning.data.rows import Rows, pool
from fedcore.learning.data.split import FoldSplit, ValidationPart
from fedcore.learning.data.statistics import MIN_CONTRIBUTORS, Statistics
from fedcore.learning.dealing import dealt
from fedcore.learning.device import move_loss, require_device
from fedcore.learning.findings import lines
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.model import FlatModel, first_difference, seeded, single_thread
from fedcore.learning.module_state import attribute_that_differs
from fedcore.learning.site import LoadedSite, SiteRows, SiteTrainer, load_site, model_of, sample_of
from fedcore.learning.state import model_digest
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.task import Task, load_task
from fedcore.learning.training import task_code
from fedcore.learning.warm_start import scale_note
from fedcore.secagg.encode.pack import Layout as VectorLayout
from fedcore.secagg.in_process import sum_engine
from fedcore.secagg.label import Terms, label_of, label_warnings
from fedcore.secagg.plan import RoundPlan, check_threshold
from fedcore.secagg.protections import MAX_MASKED_SITES, Protection, refuse_roster
from fedcore.secagg.protocol.absences import parse_absence
from fedcore.secagg.scheme import vector_bytes
from fedcore.secagg.site_groups import refuse_few
from fedcore.types import ARMS, Json, SiteId

_DEALING_KEYS = ("by", "n", "alpha", "seed")
"""The keys of [sites] that deal rows to sites, as `learning.dealing.dealt` and `fedcore.split` take them."""


LOOKED_AT = 256
"""Sites whose rows and model are looked at for what is probably wrong with the task: with thousands of sites, which
have the same code and mostly the same kind of rows, that would take longer than the rounds."""


def resolve_sites(task: Task, job: Job) -> dict[SiteId, Any]:
    """{site id: source} from the job, else the task's own; dealt again where the job asks for a partition that the
    task does not make. Raises BadInput where there is none."""
    wanted = dict(job.sites)
    own = tuple(signature(task.sites).parameters) if callable(task.sites) else ()
    keys = tuple(dict.fromkeys((*own, *_DEALING_KEYS)))
    if task.sites is not None and (set(wanted) <= set(keys) or "n" in wanted):
        for key in wanted:
            if key not in keys:
                raise UnknownName("key", f"sites.{key}", [f"sites.{k}" for k in keys])
        ours: dict[str, Any] = (
            {} if set(own) >= {"by"} else {k: v for k, v in wanted.items() if k not in own}
        )
        with seeded(0, 0, "", "sites"), task_code("(all)", None, "sites"):
            mine = {k: v for k, v in wanted.items() if k not in ours}
            wanted = _mapping(task.sites(**mine) if callable(task.sites) else task.sites)
        if ours:
            wanted = dict(dealt(task, wanted, **ours))
    elif wanted and set(wanted) <= set(_DEALING_KEYS):
        raise BadInput(
            f"sites: found {', '.join(sorted(wanted))}, but task {task.name!r} has no sites to deal again",
            remedy='give [sites] as `id = "source"` lines, or the task `sites`',
        )
    if not wanted:
        raise BadInput(
            f"sites: task {task.name!r} names none, and neither does the job",
            remedy='add [sites] to the job file (`id = "source"`), or pass sites={...}',
        )
    wanted = {str(name): source for name, source in wanted.items()}
    check_sites(wanted, deployed=False)
    return {SiteId(name): source for name, source in wanted.items()}


def _mapping(sites: object) -> dict[str, Any]:
    if not isinstance(sites, Mapping):
        raise BadInput(
            f"task.sites: found {type(sites).__name__}, expected a mapping of site id to source",
            remedy='sites={"north": "north.csv", ...}: what task.data gets for each site',
        )
    return dict(sites)


@dataclass
class Prepared:
    """Everything of a run before its first training. loaded: the sites' rows as they are; sites: as inputs.
    findings: what is probably wrong with the task, as (warning, hint)."""

    job: Job
    task: Task
    plan: RoundPlan
    sites: list[SiteRows]
    flat: FlatModel
    federation: Federation
    transport: MetricTransport
    loaded: Sequence[LoadedSite]
    findings: Sequence[tuple[str, str]]
    of_app: Rows | None = None
    """All rows as one party's, of a task that is an app and gives them; others are pooled here."""

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that can be had of those that the job asks for, in the order of ARMS."""
        missing = set() if self.task.app is None or self.of_app is not None else {"centralised"}
        wanted = {*self.job.track.arms, "federated"} - missing
        return tuple(arm for arm in ARMS if arm in wanted)

    @property
    def of_sites(self) -> bool:
        """Whether each site uses a model in which something is its own."""
        return self.job.round.buffers == "local" or self.plan.train.personal

    def pooled(self) -> Rows:
        """The training rows of all sites, as inputs."""
        parts = [site.train for site in self.sites]
        return pool(parts) if self.of_app is None else self.of_app

    @property
    def statistics(self) -> Statistics | None:
        """The scale of all sites' rows; None for rows without columns."""
        return self.federation.state.statistics or self.federation.sites[0].public

    @property
    def label(self) -> str:
        """The run's label, computed from the plan."""
        few: list[str] = []
        if self.statistics is not None and any(self.statistics.sites):  # not of public ranges
            counts = zip(self.statistics.names, self.statistics.sites, strict=True)
            few = [name for name, sites in counts if sites < MIN_CONTRIBUTORS]
        return label_of(Terms.of_plan(self.plan), few)

    @property
    def about_engine(self) -> list[str]:
        """How sums are made and sites trained, in a few words each, where it is not as in a deployment."""
        found = [] if self.federation.engine.as_planned else ["sums exact, without cryptography"]
        if (chosen := self.federation.choice) is not None and not chosen.why:
            found.append(f"sites trained {chosen.name}")
        if (dealing := self.federation.dealing) is not None:
            found.append(f"{dealing.count} {dealing.called}")
        return found

    @property
    def notes_on_start(self) -> list[str]:
        """What a GPU, sums without cryptography and a released model as the start give reason to say."""
        found = []
        if self.job.run.device != "cpu":
            found.append(
                f"Trained on {self.job.run.device}: another device gives slightly other numbers."
            )
        if not self.federation.engine.as_planned:
            found.append(
                f'Sums were added without cryptography (sum = "exact"): the model is that of {self.plan.protection!r}, '
                "bit for bit, but nothing was protected here, and neither its time nor what each party holds was "
                'measured. The label is that of the plan, deployed or with sum = "full".'
            )
        return found + self._notes_on_initial()

    def _notes_on_initial(self) -> list[str]:
        if self.job.run.initial is None:
            return []
        targets = self.federation.sites[0].target_scale(self.federation.state)
        scale = scale_note(Path(self.job.run.initial), self.statistics, targets)
        seen = (
            "All arms begin with a trained model. If it has seen rows that are test rows here, every score is too "
            "good."
        )
        return [seen, scale] if scale else [seen]

    @property
    def own_test_rows(self) -> bool:
        """Whether every site brings its own test part, so that folds do nothing."""
        return all(one.test is not None for one in self.loaded)

    def plan_json(self) -> Json:
        """`plan.json`: the plan, its digest, the proof, the forecast, the label."""
        return describe_plan(self.plan) | {
            "label": self.label,
            "lattice": self.job.protect.lattice,
            "warnings": label_warnings(Terms.of_plan(self.plan)),
            "buffers_policy": self.flat.policy,
            **({"task_settings": self.task.values} if self.task.settings else {}),
        }


def describe_plan(plan: RoundPlan) -> Json:
    """A plan as people read it: flat numbers, the headroom inequality, exact bytes per site and round."""
    packing, ring, headroom = plan.packing, plan.packing.ring, None
    layout = VectorLayout(plan.update_vector, packing, plan.per_round)
    up, down = vector_bytes(layout, plan.per_round)
    if ring:
        needed, available = ring.headroom(packing.max_sites, packing.slot_bits)
        headroom = {
            "rule": "43 n + 1 < q / t",
            "bound": needed >> packing.slot_bits,
            "limit": available >> packing.slot_bits,
        }
    noise = None
    if plan.privacy is not None:
        noise = asdict(plan.noise_grid) | {"epsilon": plan.privacy.spent(plan.rounds)}
    return plan.to_json() | {
        **({"noise": noise} if noise else {}),
        "digest": plan.digest,
        "bits": packing.bits,
        "max_sites": packing.max_sites,
        "field_width": packing.field_width,
        "fields_per_slot": packing.fields_per_slot,
        "slot_bits": packing.slot_bits,
        "degree": ring.degree if ring else None,
        "coeff_modulus": ring.modulus if ring else None,
        "coordinates": plan.coordinates,
        "ciphertexts": layout.blocks if ring else 0,
        "used_fraction": layout.used_fraction,
        "headroom": headroom,
        "bytes_up": up,
        "bytes_down": down,
    }


def prepare(task: Task, job: Job, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Load and split the sites, build the model, solve the plan, run the federated statistics."""
    move_loss(task.loss, require_device(job.run.device))
    sources = resolve_sites(task, job)
    if task.app is not None:
        refuse_of_app(task, job)
        task = task.at_source(next(iter(sources.values())))
    # RoundPlan refuses it too; asking here spares the loading of every site's rows.
    job, of_cohort = _of_many(job, len(sources))
    per_round = job.round.cohort or len(sources)
    refuse_roster(per_round, job.protect.protection)
    refuse_few(job.round, len(sources))
    packing = packing_of(job, per_round)  # refused before any site is loaded
    if job.privacy.epsilon is not None and job.protect.max_examples is None:
        raise BadInput(
            "protect.max_examples: found none with privacy.epsilon, expected a public cap on the rows of a site",
            remedy="--max-examples 320: without one it would follow from the rows, and tell of them without noise",
        )
    if job.protect.threshold is not None:
        check_threshold(job.protect.threshold, per_round)
    named = tuple(parse_absence(text, list(sources), job.round.rounds) for text in job.round.drop)
    if packing.ring is not None and job.run.sum == "full":
        from fedcore.secagg.crypto.bfv import load_seal

        load_seal()
    loaded, split = [], FoldSplit(job.run.seed, job.run.fold, job.run.folds)
    share, apart = job.round.validate, None
    if share is not None:
        apart = ValidationPart(share, job.run.seed, job.run.fold)
    for index, (name, source) in enumerate(sources.items()):
        say(f"loading site {name}")
        loaded.append(load_site(task, split, name, index, source, job.protect.max_examples, apart))
    sites, watch = [one.rows for one in loaded], Stopwatch()
    if share is not None and not any(site.validation for site in sites):
        raise BadInput(
            f"round.validate: found no row in a share of {share:g} of the training rows of any site, expected some",
            remedy="a larger share, or none: such sites are too small to choose a round by",
        )
    largest = max(map(len, sites))
    max_examples = job.protect.max_examples or 1 << max(4, (largest - 1).bit_length())
    flat, of_calls = _build(task, job, sites)
    looks = [one.look(task, job, flat) for one in loaded[:LOOKED_AT]]
    findings = of_cohort + of_calls + lines(each for look in looks for each in look.findings)
    of_app = None
    if task.app is not None:
        findings += task.app.notes
        if "centralised" in job.track.arms:
            say("asking the app for all data as one partition")
            of_app, said = _pooled_by(task, [site.train for site in sites])
            findings += said
    adds_rows = looks[0].adds_rows
    transport = MetricTransport.of(task, sample_of(task, job, flat, sites[0]), max_examples)
    initial = flat.read()
    trainers = [
        SiteTrainer(task, job, site, flat, transport, initial, watch, adds_rows=adds_rows)
        for site in sites
    ]
    plan = plan_of(job, trainers[0].shape, tuple(s.id for s in sites), max_examples)
    if job.run.initial is not None:
        plan = replace(plan, train=replace(plan.train, initial=model_digest(initial)))
    engine = sum_engine(uuid.uuid4().hex, plan, exact=job.run.sum == "exact")
    federation = Federation(
        plan, trainers, engine, initial,
        Leaving(named, job.round.dropout, job.run.seed), watch,
        # Under `plain` nothing is hidden anyway, so few sites may contribute; the label says so.
        allow_few_sites=not plan.layers.protects or job.protect.single_site_features,
    )  # fmt: skip
    while federation.purpose is not None and federation.purpose.of_columns:
        say("federated statistics")
        federation.advance()
    inputs = [trainer.standard_rows(federation.state) for trainer in trainers]
    with single_thread():
        federation.choose_executor(job.run.executor)
    if (chosen := federation.choice) is not None:  # an interrupted run goes on with it
        job = replace(job, run=job.run.model_copy(update={"executor": chosen.name}))
        if chosen.why:
            findings.append((f"sites are trained one after the other: {chosen.why}", _ONE_BY_ONE))
    return Prepared(job, task, plan, inputs, flat, federation, transport, loaded, findings, of_app)


def _of_many(job: Job, sites: int) -> tuple[Job, list[tuple[str, str]]]:
    """The job as a simulation of so many sites has it, and what is to be said of it as (warning, hint).

    Raises BadInput for a cohort of more sites than there are, and for one whose sums are to be protected.
    """
    cohort, protection = job.round.cohort, Protection.of(job.protect.protection)
    exact = job.run.sum == "exact"
    if cohort is not None and cohort > sites:
        raise BadInput(
            f"round.cohort: found {cohort}, expected at most the {sites} sites that there are",
            remedy="leave it out for rounds of all sites",
        )
    if cohort is not None and job.round.aggregate != "mean":
        raise BadInput(
            f"round.cohort: found {cohort} with round.aggregate = {job.round.aggregate!r}, expected none: its groups "
            "are of the whole roster",
            remedy='aggregate = "mean" takes a cohort',
        )
    if cohort is not None and protection.protects and not exact:
        raise BadInput(
            'round.cohort: found one with sum = "full", expected "exact": the protocol is of all sites in every round',
            remedy="--sum exact adds the same integers without cryptography",
        )
    per_round = cohort or sites
    if not exact or not protection.masks or per_round <= MAX_MASKED_SITES:
        return job, []
    protect = job.protect.model_copy(update={"protection": "encrypted"})
    return replace(job, protect=protect), [
        (
            f"rounds of {per_round} sites: masks are made for up to {MAX_MASKED_SITES}, so the plan, its label and "
            f"its bytes are those of 'encrypted' and not of {protection.name!r}; the model is the same",
            "--protection encrypted says so beforehand",
        )
    ]


_ONE_BY_ONE = 'executor = "sequential" says so beforehand'


def _pooled_by(task: Task, parts: Sequence[Rows]) -> tuple[Rows | None, list[tuple[str, str]]]:
    """All sites' training rows as one party's, where an app gives them, and what is to be said of it as (warning,
    hint)."""
    assert task.app is not None
    try:
        with seeded(0, 0, "", "data"):
            found: Rows = task.app.pooled(parts)
    except (BadInput, TaskFailed) as error:
        return None, [
            (
                f"no centralised arm, so the gap to it is unknown: only the app can read its rows, and {error}",
                "an app that loads by num-partitions can give all data as one partition; or give model and data as a "
                "task (docs/tasks.md)",
            )
        ]
    text = (
        f"the centralised arm is the app trained on partition 0 of 1 ({len(found):,} rows, as at the sites together); "
        "if rows that a site tests on are among them, which only the app knows, this arm looks better than it is"
    )
    return found, [(text, "split off test rows before the partitions are made")]


def _build(
    task: Task, job: Job, sites: Sequence[SiteRows]
) -> tuple[FlatModel, list[tuple[str, str]]]:
    """The run's module and its flat view, and a warning with its hint where attributes of two modules differ.

    Every site builds the model under the same seed; of the first LOOKED_AT one whose model differs is named.
    """
    flat, found = model_of(task, job, sites[0]), None
    sizes = flat.parameters, flat.buffer_coordinates
    for site in sites[1:LOOKED_AT]:
        other = model_of(task, job, site)
        if (other.parameters, other.buffer_coordinates) != sizes:
            raise BadInput(
                f"site {site.id}: found a model of {other.coordinates} coordinates, expected "
                f"{flat.coordinates} as at site {sites[0].id}",
                remedy="every site must have the same columns and build the same model",
            )
        if name := first_difference(flat.module, other.module):
            raise BadInput(
                f"task.model: found other initial values of {name} in a second call, expected the same ones under "
                "the same seed",
                remedy="draw them from torch's or NumPy's global generators, which the run seeds, and set every "
                "value: torch.empty sets none",
            )
        found = found or attribute_that_differs(flat.module, other.module)
    if found is None:
        return flat, []
    return flat, [
        (
            f"task.model: found another value of {found} in a second call: random or unset state between two model() "
            "calls",
            "draw it from Python's, torch's or NumPy's global generators, which the run seeds; a deployed site has a "
            "value of its own",
        )
    ]


def job_json(task: Task, job: Job, kind: str = "run") -> Json:
    """job.json: all it takes to run again. What was made in memory is marked by None."""
    in_memory = any(not is_json(source) for source in job.sites.values())
    sites = None if in_memory else dict(job.sites)
    about = {"task": task.origin or None, "task_name": task.name, "sites": sites, "kind": kind}
    return job.to_json() | about


def made_in_memory(stored: Json) -> bool:
    """Whether a job.json is of a task or of sites that no command can bring back."""
    return stored["sites"] is None or stored["task"] is None


def stored_job(directory: Path, task: Task | None) -> Json:
    """The job of a run directory as a layer of settings, with its `kind`, and the `seeds` of a comparison, beside
    them.

    Raises BadInput where the run was made from objects in memory, which no file can bring back.
    """
    found = read_json(directory / "job.json")
    name = found.pop("task_name")
    if found["sites"] is None or (task is None and made_in_memory(found)):
        raise BadInput(
            f"{directory}: task {name!r} or its sites were made in memory, so the command line cannot "
            "run it again",
            remedy="put the task into a file: `fedcore new DIR` shows how",
        )
    if not found["sites"]:
        del found["sites"]
    return {key: value for key, value in found.items() if value is not None}


def job_for(task: Task | None, *layers: Mapping[str, Any]) -> tuple[Task, Job]:
    """The task and the complete job: task defaults below, then the given layers in order."""
    layer: Mapping[str, Any] = next((each for each in reversed(layers) if "task" in each), {})
    named, base = layer.get("task", "heart"), Path(layer.get("base", Path.cwd()))
    if not isinstance(named, str):
        raise BadInput(
            "task: found a table, expected the task's name or file",
            remedy="settings of the task itself are under [task_settings]",
        )
    found = task if task is not None else load_task(named, base)
    rest = [{k: v for k, v in layer.items() if k != "task"} for layer in layers]
    name = {"task": found.origin or found.name, "base": str(base)}
    job = build_job(found.defaults, *rest, name)
    found = found.with_settings(job.task_settings)
    if found.app is not None:  # its defaults follow from its settings
        job = build_job(found.defaults, *rest, name)
    return found, replace(job, task_settings=found.given)
