"""How a run was made, in words: the Methods paragraph for a paper, and the settings of the run.

Invariant: a clause whose facts a result does not hold is left out rather than guessed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fedcore.report import phrases
from fedcore.report.sentences import arms_of, how_measured, of_groups, setting, splits, which_split
from fedcore.results import ComparisonResult, Result, RunResult
from fedcore.secagg.protections import PROTECTIONS, unprotected

_RATES = ("lr", "momentum")
_IF_CHANGED = (
    "proximal_mu", "max_grad_norm", "lr_schedule", "lr_decay", "lr_step_rounds", "warmup_rounds", "algorithm",
    "feddyn_alpha", "ditto_lambda", "local_parameters", "frozen_parameters",
)  # fmt: skip
"""Settings of training that a result has only where they change something."""


def choices(result: Result, *, seeds: bool = True) -> dict[str, str]:
    """{key: short fact} of everything that a person chose for a run. seeds: with its seed and fold."""
    plan, train, absences = result.plan, result.train, result.absences
    server, rule = plan.get("server") or {}, plan.get("range") or {}
    dropped = phrases.listed(map(phrases.plain, absences.drop))
    facts = {
        "task": f"task {phrases.plain(result.task)}",
        "protection": phrases.plain(result.protection),
        "rounds": phrases.plural(result.rounds, "round"),
        "threshold": f"threshold {plan['threshold']}" if plan.get("threshold") else "",
        "drop": f"drop {dropped}" if dropped else "",
        "dropout": f"dropout {absences.dropout}" if absences.dropout else "",
        "bits": f"{plan.get('bits')} bits",
        "range": f"range {phrases.plain(rule.get('start') or 'estimated')}"
        + (", adaptive" if rule.get("adaptive") else ""),
        "server": f"server {phrases.plain(server.get('optimiser', phrases.DASH))}",
        **{f"server {key}": f"server {key} {server[key]}" for key in _RATES if key in server},
        "optimiser": f"local {phrases.plain(train.get('optimiser', phrases.DASH))}",
        **{key: f"{key} {train[key]}" for key in _RATES if key in train},
        "epochs": phrases.plural(int(train.get("epochs") or 0), "epoch"),
        "batch_size": f"batch size {phrases.plain(train.get('batch_size'))}",
        "weight_decay": f"weight decay {phrases.plain(train.get('weight_decay'))}",
        **{key: f"{key} {phrases.plain(train[key])}" for key in _IF_CHANGED if key in train},
        "initial": f"initial model {train['initial'][:12]}" if train.get("initial") else "",
        "arms": f"arms {phrases.listed(phrases.ARM_NAMES.get(a, phrases.plain(a)) for a in arms_of(result))}",
        "sites": phrases.plural(len(result.sites), "site"),
    }
    said = {key: fact for key, fact in facts.items() if fact}
    return said | (which_split(result) if seeds else {})


def settings_of(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """(facts that all runs share, the other facts of each run). Those that differ in the plan and the training
    come first; a fact that a run does not have is left out."""
    chosen = [choices(result) for result in results]
    differing = [
        key
        for key in dict.fromkeys(key for facts in chosen for key in facts)
        if len({facts.get(key) for facts in chosen}) > 1
    ]
    said = [setting(result) for result in results]
    shared = [fact for fact in said[0] if all(fact in other for other in said)]
    own = []
    for facts, settings in zip(chosen, said, strict=True):
        different = [facts[key] for key in differing if key in facts]
        rest = [fact for fact in settings if fact not in shared]
        own.append(list(dict.fromkeys([*different, *rest])))
    return shared, own if any(own) else [["the same plan, training and seed"] for _ in own]


def methods(result: Result) -> str:
    """A paragraph for a paper, from the plan and the result."""
    return " ".join(of(result) for of in (_data, _training, _protection, _evaluation))


def _data(result: Result) -> str:
    known = {site: found.rows for site, found in result.per_site.items() if found.rows}
    sizes = [
        f"{phrases.plain(s)}, n = {phrases.count(known[s])}" for s in result.sites if s in known
    ]
    text = f"The task {phrases.plain(result.task)} was learnt across {phrases.plural(len(result.sites), 'site')}"
    if known:
        text += f" holding {sum(known.values()):,} rows"
    if sizes and len(sizes) <= 8:
        text += f" ({'; '.join(sizes)})"
    text += "."
    if isinstance(result, ComparisonResult):
        text += (
            " Within each site, rows were split at random into stratified folds; "
            if result.folds > 1
            else " Every site brought its own test rows; "
        )
        text += f"all arms were repeated over {splits(result)}."
    elif isinstance(result, RunResult) and (rows := result.rows) is not None:
        apart = f", {phrases.count(rows.validation)} validation" if rows.validation else ""
        held = f"{phrases.count(rows.train)} training{apart} and {phrases.count(rows.test)} test rows{of_groups(rows)}"
        text += (
            f" Within each site, rows were split at random into {result.folds} stratified folds, "
            f"one of which was held out ({held}; seed {result.seed}, fold {result.fold})."
            if result.folds
            else f" There were {held}."
        )
        if rows.groups:
            text += " Rows of one group were kept on one side of every split, and drawn together in resamples."
    scale = result.statistics if isinstance(result, RunResult) else None
    if scale is not None and scaled_by_ranges(scale):
        text += (
            " Numbers were scaled by the public ranges that the task declares, and a missing value became the "
            "middle of its range."
        )
    elif scale:
        text += (
            " Missing values were imputed and features standardised with means and standard deviations over the "
            "sites' training rows, which were computed through the same protected sum."
        )
    return text


def scaled_by_ranges(statistics: Mapping[str, Any]) -> bool:
    """Whether columns were scaled by their declared ranges alone: then no row is counted in the scale."""
    return not any(statistics.get("sites") or [])


def _training(result: Result) -> str:
    model, train = result.model, result.train
    size = phrases.plural(model.coordinates, "coordinate") if model.coordinates else ""
    described = _bracketed([phrases.plain(model.summary), size])
    rounds = phrases.plural(result.rounds, "round")
    text = f"The model{described} was trained by federated averaging for {rounds}"
    if train.get("epochs"):
        epochs = phrases.plural(int(train["epochs"]), "local epoch")
        text += f", each of {epochs} with {_optimiser(train)}{_rates(train)}"
    if train.get("initial"):
        text += f", begun with the released model {phrases.plain(train['initial'][:12])}"
    server = result.plan.get("server") or {}
    if server.get("optimiser") not in (None, "", "fedavg"):
        text += f"; the released mean was applied by {_optimiser(server)}{_rates(server)}"
    if result.kept:
        text += (
            ". Of every arm the model of its best round on the validation rows was kept, on which no arm was "
            "trained"
        )
    return text + "."


def _optimiser(section: Mapping[str, Any]) -> str:
    name = section.get("optimiser")
    return _OPTIMISERS.get(str(name), phrases.plain(name))


_OPTIMISERS = {
    "sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "fedavgm": "server momentum, FedAvgM", "fedadam": "FedAdam",
    "fedyogi": "FedYogi",
    "fedadagrad": "FedAdagrad",
}  # fmt: skip


def _rates(section: Mapping[str, Any]) -> str:
    names = {
        "lr": "learning rate", "batch_size": "batch size", "weight_decay": "weight decay",
        "proximal_mu": "proximal term (FedProx) with mu", "max_grad_norm": "gradients clipped to a norm of",
        "lr_schedule": "learning-rate schedule", "lr_decay": "decay of the rate",
        "lr_step_rounds": "rounds from step to step", "warmup_rounds": "rounds of warm-up",
        "algorithm": "federated algorithm", "feddyn_alpha": "alpha of FedDyn",
        "ditto_lambda": "lambda of Ditto", "local_parameters": "parameters that stay at the sites",
        "frozen_parameters": "frozen parameters",
    }  # fmt: skip
    keys = ("lr", "batch_size", "momentum", "weight_decay", *_IF_CHANGED)
    return _bracketed([f"{names.get(k, k)} {section[k]}" for k in keys if section.get(k)])


def _bracketed(facts: Sequence[str]) -> str:
    known = ", ".join(filter(None, facts))
    return f" ({known})" if known else ""


def _protection(result: Result) -> str:
    plan, protection = result.plan, result.protection
    text = "Updates were weighted by their examples"
    if plan.get("bits"):
        text += f" and rounded stochastically to {plan['bits']}-bit integers"
    if plan.get("fields_per_slot") and plan.get("slot_bits"):
        fields = plan["fields_per_slot"]
        words = {1: "one", 2: "two", 3: "three"}.get(fields, fields)
        text += f", {words} to a slot of {plan['slot_bits']} bits"
    layers = PROTECTIONS.get(protection)
    if layers is None:
        text += f", and summed under the protection {phrases.plain(protection)}"
    elif not layers.protects:
        text += "; their sum was not protected (simulation only)"
    elif not layers.encrypts:
        text += f", and summed under {_MASKS}"
    else:
        text += f", put under {_MASKS}" if layers.masks else ""
        text += f", and summed under {_CIPHERS.get(plan.get('cipher', 'bfv'), 'encryption')}"
        if plan.get("degree"):
            primes = _primes(plan.get("coeff_modulus"))
            text += f" (ring degree {plan['degree']}{', ' + primes if primes else ''}; Microsoft SEAL through TenSEAL)"
        text += " with a key shared by the sites and unknown to the coordinator"
    text += "."
    headroom = plan.get("headroom") or {}
    if headroom.get("bound") is not None and headroom.get("limit") is not None:
        sites = plan.get("max_sites")
        most = f" of at most {phrases.plural(int(sites), 'site')}" if sites else ""
        text += (
            f" That a sum{most} cannot overflow was proved from the plan before the first round."
        )
    text += _absences(result)
    clipped = result.sums.clipped_fraction
    if clipped is not None:
        text += (
            f" Of all coordinates sent, {clipped * 100:.2g} % exceeded the range and were clipped."
            if clipped
            else " No coordinate exceeded the range."
        )
    return text


_CIPHERS = {
    "bfv": "BFV homomorphic encryption",
    "keystream": "additively homomorphic AES-256 keystreams (after Castelluccia, Mykletun and Tsudik 2005)",
}
_MASKS = "pairwise and self masks agreed anew in every round (X25519 with ML-KEM-768; after Bonawitz et al. 2017)"


def _absences(result: Result) -> str:
    """The threshold, and what was simulated of sites that leave; both only where they matter."""
    threshold, absences = result.plan.get("threshold"), result.absences.count
    text = ""
    if threshold and (absences or not unprotected(result.protection)):
        sites = phrases.plural(len(result.sites), "site")
        text += f" A round needed {threshold} of {sites} at every stage."
    if absences:
        abandoned = len(result.absences.abandoned)
        text += f" Absences were simulated: {phrases.plural(absences, 'time')} a site left a round"
        if abandoned:
            text += f", and {phrases.plural(abandoned, 'round')} in which too few stayed changed nothing"
        text += "."
    return text


def _primes(modulus: Any) -> str:
    primes = modulus if isinstance(modulus, list) else [modulus] if modulus else []
    bits = [str(int(prime).bit_length()) for prime in primes]
    if len(bits) == 1:
        return f"one {bits[0]}-bit prime"
    return f"primes of {phrases.listed(bits)} bits" if bits else ""


def _reference_rows(result: Result) -> str:
    """How many rows the reference arms trained on: those of the survivors, or more."""
    if not result.absences.count:
        return " and saw as many training rows"
    every = [phrases.ARM_NAMES[a] for a in ("centralised", "local_only") if a in result.arm_names]
    facts = [f"{phrases.listed(every)} trained on all sites' rows in every round"] if every else []
    if "federated_float" in result.arm_names:
        facts.append("federated averaging in floating point on those of each round's survivors")
    return f"; {', and '.join(facts)}"


def _evaluation(result: Result) -> str:
    names = phrases.listed(phrases.metric_name(m) for m in result.metrics)
    references = ("centralised", "local_only", "federated_float")
    arms = phrases.listed(phrases.ARM_NAMES[arm] for arm in references if arm in result.arm_names)
    text, rows = "", _reference_rows(result)
    if arms:
        text = f"Reference arms ({arms}) used the same seeds and splits{rows}. "
    verb = "were" if len(result.metrics) > 1 else "was"
    text += f"{phrases.capitalised(names)} {verb} measured over the union of the sites' test rows"
    if method := how_measured(result):
        errors = [result.is_error(metric) for metric in result.metrics]
        gap, within = "centralised minus federated", "one point of it"
        if all(errors):
            gap, within = "federated minus centralised", "1 % of the centralised value"
        elif any(errors):
            gap += " (of errors federated minus centralised)"
            within += " (of errors 1 % of the centralised value)"
        text += f"; the gap is {gap}, with an interval by {method}"
        text += f", read as no measurable loss only where it contains 0 and stays within {within}"
    text += "."
    version = result.origin.environment.get("fedcore")
    if version:
        text += f" Computed with Fedcore {phrases.plain(version)}."
    return text
