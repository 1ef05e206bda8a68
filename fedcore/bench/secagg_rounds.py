"""`fedcore bench secagg`: one whole protected round, from keys to certificate, for each number of sites.

Both protocol machines run in this process, with real keys, shares, signatures, masks, encryption and
tags; `drop` sites leave after they shared their keys, the case in which masks must be rebuilt.
Invariant: the opened sum is compared with the plain integer sum, slot for slot; a row states whether they
are equal. Seconds are CPU time of one thread: of one site (the mean over sites; every site would open
the sum, here it is opened once), and of the coordinator. Sending takes no time here.
"""

import time
from collections import Counter
from collections.abc import Sequence
from statistics import mean

import numpy as np
from rich.console import RenderableType

from fedcore.bench import document, plan_of, progress, protection_of, require_at_least, table_page
from fedcore.errors import BadInput
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.plan import EXCEEDS, RoundPlan, default_threshold
from fedcore.secagg.protections import Protection, masking, refuse_cipher
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.wire_form import encode
from fedcore.secagg.summing import one_by_one
from fedcore.seeds import generator
from fedcore.types import Contribution, Json


def run(
    parameters: int,
    sites: Sequence[int],
    drop: int = 1,
    bits: int = 16,
    protection: str = "layered",
    cipher: str = "bfv",
    seed: int = 0,
) -> Json:
    """One round for each number of sites, at the default threshold.

    drop: sites that leave before they send their vector. Returns the JSON of kind bench-secagg.
    Raises BadInput where that many absences are not survived, and PlanRefused.
    """
    layers = Protection.of(protection)
    if not layers.masks:
        raise BadInput(
            f"--protection: found {protection!r}, expected one of {', '.join(masking())}",
            remedy="`fedcore bench protect` has every protection",
        )
    refuse_cipher(protection, cipher)
    require_at_least("--parameters", parameters, 1)
    for count in sites:
        survived = count - default_threshold(count)
        if not 0 <= drop <= survived:
            raise BadInput(
                f"--drop: found {drop}, expected 0 to {survived}, the absences that "
                f"{count} sites survive",
                remedy="more --sites, or fewer to drop",
            )
    rows = []
    for count in sites:
        progress(f"bench secagg: {count} sites, {parameters} parameters, {drop} dropping out")
        rows.append(_row(plan_of(parameters, count, bits, protection, cipher), drop, seed))
    return document(
        "secagg", parameters=parameters, protection=protection,
        cipher=cipher if layers.encrypts else None, bits=bits, drop=drop, seed=seed, rows=rows,
    )  # fmt: skip


def _row(plan: RoundPlan, drop: int, seed: int) -> Json:
    epoch = InProcessFederation("bench", plan, as_deployed=True)
    watch = Stopwatch(time.process_time)
    up, down = Counter[str](), Counter[str]()  # bytes of messages, without the vectors, per site

    def tap(to: str, message: messages.RoundMessage) -> None:
        if isinstance(message, messages.SiteMessage):
            up[message.site] += len(encode(message))
        else:
            down[to] += len(encode(message))

    epoch.tap = tap
    absences = dict.fromkeys(plan.sites[1 : 1 + drop], "submit")

    def contribute(index: int) -> Contribution:
        rng = generator(seed, 1, plan.sites[index], "bench fields")
        fields = rng.integers(0, 1 << plan.packing.bits, plan.parameters, dtype=np.uint64)
        return fields, {"weight": [1], "over_range": [0], "over_half_range": [0], EXCEEDS: [0]}

    total = epoch.sum(
        plan.update_vector, 1, one_by_one(contribute), b"bench", watch, absences=absences
    )
    survivors = len(total.survivors)
    control_up, control_down = round(mean(up.values())), round(mean(down.values()))
    layout = Layout(plan.update_vector, plan.packing, len(plan.sites))
    return {
        "sites": len(plan.sites),
        "threshold": plan.threshold,
        "survivors": survivors,
        "exact": total.twin is total.opened,
        "slots": layout.slots,
        "bytes_up_per_site": total.bytes_up + control_up,
        "bytes_up_per_parameter": round(total.bytes_up / plan.parameters, 4),
        "control_bytes_up_per_site": control_up,
        "control_bytes_down_per_site": control_down,
        "bytes_down_per_site": total.bytes_down + control_down,
        "site_cpu_seconds": {
            "encode": round(watch.seconds["encode"] / survivors, 6),
            "protect": round(watch.seconds["protect"] / survivors, 6),
            "unprotect": round(watch.seconds["unprotect"], 6),
        },
        "coordinator_cpu_seconds": round(watch.seconds["fold"], 6),
    }


def page(found: Json) -> RenderableType:
    """The output of `fedcore bench secagg` for a terminal."""
    head = (
        "sites", "in the sum", "threshold", "bytes up", "control up", "control down",
        "site CPU, s", "coordinator CPU, s", "sum",
    )  # fmt: skip
    rows = (
        (
            row["sites"], row["survivors"], row["threshold"], f"{row['bytes_up_per_site']:,}",
            f"{row['control_bytes_up_per_site']:,}", f"{row['control_bytes_down_per_site']:,}",
            f"{sum(row['site_cpu_seconds'].values()):.3f}", f"{row['coordinator_cpu_seconds']:.3f}",
            "exact" if row["exact"] else "NOT the plain sum",
        )
        for row in found["rows"]
    )  # fmt: skip
    note = (
        f"{found['parameters']:,} parameters at {found['bits']} bits under {protection_of(found)}, "
        f"{found['drop']} of the sites leaving after the shares; bytes and CPU seconds per site"
    )
    return table_page(head, rows, note)
