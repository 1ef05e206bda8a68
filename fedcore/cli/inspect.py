"""The output of `fedcore plan` and `fedcore check`: a plan as text, and a task tested on every site."""

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.errors import BadInput
from fedcore.experiment.prepare import Prepared
from fedcore.learning.model import model_summary, single_thread
from fedcore.learning.training import local_train
from fedcore.report.phrases import plain, plural, size
from fedcore.report.terminal import fitted, grid
from fedcore.secagg.packing import price_list
from fedcore.secagg.privacy.statement import statement, statement_lines
from fedcore.types import Json


def check_task(prepared: Prepared) -> Json:
    """One training step at every site, as JSON. Raises TaskFailed with the user's traceback if one fails."""
    sites: Json = {}
    initial, train = prepared.flat.read(), prepared.plan.train
    with single_thread():
        for site, loaded in zip(prepared.sites, prepared.loaded, strict=True):
            prepared.flat.write(initial)
            size = getattr(site.train, "batch_size", None) or train.batch_size
            batch = np.arange(min(size, len(site.train)), dtype=np.int64)
            # An app trains on all rows of a site or none.
            rows = site.train.take(batch) if prepared.task.app is None else site.train
            report = local_train(
                prepared.task, prepared.flat.module, rows, train,
                seed=prepared.job.run.seed, round_=1, rounds=prepared.plan.rounds, site=site.id,
            )  # fmt: skip
            sites[site.id] = {
                "train_rows": len(site.train),
                "test_rows": len(site.test),
                "class_counts": loaded.class_counts,
                "loss_of_first_step": report.loss,
            }
    return {
        "task": prepared.task.name,
        "task_digest": prepared.plan.task_digest,
        "task_covers": prepared.task.covers(),
        "sites": sites,
        "model": model_summary(prepared.flat),
        "parameters": prepared.flat.parameters,
        "buffer_coordinates": prepared.flat.buffer_coordinates,
        "buffers_policy": prepared.flat.policy,
        "warnings": [{"text": text, "hint": hint} for text, hint in prepared.findings],
        "plan": prepared.plan_json(),
    }


def privacy_of(prepared: Prepared) -> Json:
    """The statement of a job with privacy. Raises BadInput for one without."""
    if prepared.plan.privacy is None:
        raise BadInput(
            "privacy.epsilon: found none, expected the budget of a job with privacy",
            remedy="--epsilon 3; without one nothing bounds what sums and model tell of a row",
        )
    return statement(prepared.plan, sum(len(site.train) for site in prepared.sites))


def privacy_page(found: Json) -> RenderableType:
    """The output of `fedcore privacy` for a terminal."""
    return Group(*(Text(plain(line)) for line in statement_lines(found)))


def check_page(found: Json) -> RenderableType:
    """The output of `fedcore check` for a terminal."""
    table = grid("site", "train rows", "test rows", "loss of one step", "classes")
    # The one column of text: a site may have many classes.
    table.columns[-1].justify, table.columns[-1].no_wrap = "left", False
    for name, site in found["sites"].items():
        classes = ", ".join(f"{k}: {v}" for k, v in site["class_counts"].items()) or "-"
        loss = site["loss_of_first_step"]
        table.add_row(
            Text(plain(name)), str(site["train_rows"]), str(site["test_rows"]),
            "-" if loss is None else f"{loss:.4f}", Text(plain(classes)),
        )  # fmt: skip
    facts = [
        f"task {found['task']}, hash {found['task_digest'][:16]} over {found['task_covers']}",
        f"model {found['model']}: {found['parameters']:,} parameters, "
        f"{found['buffer_coordinates']:,} buffer values",
        f"buffers: {found['buffers_policy']}",
    ]
    for warning in found["warnings"]:
        facts += [f"warning: {warning['text']}", f"hint: {warning['hint']}"]
    head = [*(Text(plain(fact)) for fact in facts), Text()]
    return Group(*head, table, Text(), plan_page(found["plan"]))


def plan_page(found: Json) -> RenderableType:
    """The output of `fedcore plan` for a terminal."""
    packing, cipher = found["packing"], found.get("cipher")
    protection = f"{found['protection']} ({cipher})" if cipher else found["protection"]
    traffic = f"each site and round: {size(found['bytes_up'])} up, {size(found['bytes_down'])} down"
    facts = [
        f"plan {found['digest'][:16]}: {protection}, {len(found['sites'])} sites "
        f"(up to {packing['max_sites']}), {found['rounds']} rounds",
        f"encoding: {found['bits']} bits in fields of {found['field_width']}, "
        f"{found['fields_per_slot']} per slot of {found['slot_bits']} bits",
    ]
    if found["headroom"]:
        proof = found["headroom"]
        facts += [
            f"ring: degree {found['degree']}, q = {found['coeff_modulus']}, t = 2^{found['slot_bits']}",
            f"headroom: {proof['rule']}: {proof['bound']} < {proof['limit']}, proved for "
            f"{packing['max_sites']} sites",
            f"{traffic} ({plural(found['ciphertexts'], 'ciphertext')}, "
            f"{100 * found['used_fraction']:.0f} % used)",
        ]
    else:
        facts += [
            f"headroom: sums of {packing['max_sites']} values of {found['bits']} bits fit their fields",
            traffic,
        ]
    sites, threshold = len(found["sites"]), found["threshold"]
    facts += [
        f"threshold: {threshold} of {sites} sites at every stage of a round, "
        f"absences survived: {sites - threshold}",
        f"public cap on one site's rows: {found['max_examples']}",
    ]
    table = grid("sites", "per slot", "degree", "bytes/parameter up")
    prices = price_list(
        found["bits"], found["protection"], cipher=found.get("cipher", "bfv"),
        lattice=found.get("lattice", "standard"),
    )  # fmt: skip
    for row in prices:
        price = row["bytes_up_per_parameter"]
        table.add_row(
            f"{row['from_sites']} to {row['to_sites']}", str(row["fields_per_slot"] or "-"),
            str(row["degree"] or "-"), "does not fit" if price is None else f"{price:.3f}",
        )  # fmt: skip
    # A vector of one ciphertext may get another packing: this list is for vectors of many.
    title = f"Where the price jumps at {found['bits']} bits, for a large model:"
    head = [*(Text(plain(f)) for f in facts), Text(), Text(title), Text()]
    warnings = (Text(f"warning: {plain(warning)}") for warning in found.get("warnings", ()))
    return Group(*head, fitted(table), Text(), Text(found["label"]), *warnings)
