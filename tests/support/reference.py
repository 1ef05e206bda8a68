"""Slow, obvious versions of the fast paths: Python integers and loops, written from the documents alone.

Nothing here calls the code it is compared with, except for sizes (`Layout.data_fields`, `tag_slots`), and in
the whole federation for seeds, splits and local training: they have tests of their own.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.task import Task
from fedcore.learning.training import local_train
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.plan import TrainPlan
from fedcore.seeds import derive_seed, generator

TAG_PRIME = 2**61 - 1


def uint64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


# ------------------------------------------------------------------------------------- encoding


def pack_words(words: Sequence[int], bits: int) -> bytes:
    """One long integer per group of words that fills whole bytes, sliced into 8-byte lanes."""
    group = 8 // math.gcd(bits, 8)
    columns = len(words) // group
    rows = [
        sum(words[place * columns + column] << (place * bits) for place in range(group)).to_bytes(
            group * bits // 8, "little"
        )
        for column in range(columns)
    ]
    lanes = range(0, group * bits // 8, 8)
    return b"".join(row[lane : lane + 8] for lane in lanes for row in rows)


def limbs(value: int, wide_bits: int, bits: int) -> list[int]:
    """Digits of `value` in base 2^bits, least significant first."""
    digits = []
    for _ in range(math.ceil(wide_bits / bits)):
        value, digit = divmod(value, 2**bits)
        digits.append(digit)
    assert value == 0
    return digits


def tagged_slots(layout: Layout) -> int:
    """Slots before the tag, counted: as many as the data need, then more until all slots are a multiple of 8."""
    slots = fields = 0
    while fields < layout.data_fields:
        fields += layout.packing.fields_per_slot - (slots % layout.packing.slots_per_block == 0)
        slots += 1
    return slots + -(slots + layout.tag_slots) % 8


def places(layout: Layout) -> Iterator[tuple[int, int]]:
    """(slot, row) of data field 0, 1, 2, ...: row 0 skips canaries, no row enters the tag's slots."""
    size, end = layout.packing.slots_per_block, tagged_slots(layout)
    for row in range(layout.packing.fields_per_slot):
        for slot in range(end):
            if row > 0 or slot % size:
                yield slot, row


def place_of(layout: Layout, field: int) -> tuple[int, int]:
    """(slot, shift in bits) of one data field."""
    for index, (slot, row) in enumerate(places(layout)):
        if index == field:
            return slot, row * layout.packing.field_width
    raise IndexError(field)


def data_fields(layout: Layout, coordinates: Sequence[int], wides: dict, site: int) -> list[int]:
    """Coordinates, then wide limbs in the spec's order, then one mark per roster place."""
    bits = layout.packing.bits
    data = list(coordinates)
    for wide in layout.spec.wides:
        for value in wides[wide.name]:
            data += limbs(value, wide.bits, bits)
    return data + [int(index == site) for index in range(layout.sites)]


def pack(layout: Layout, coordinates: Sequence[int], wides: dict, site: int) -> list[int]:
    """One site's slots, field by field."""
    size, width = layout.packing.slots_per_block, layout.packing.field_width
    end = tagged_slots(layout)
    slots = [0] * (end + layout.tag_slots)
    for first in range(0, end, size):
        slots[first] = 2**layout.packing.bits - 1
    data = data_fields(layout, coordinates, wides, site)
    for (slot, row), value in zip(places(layout), data, strict=False):
        slots[slot] += value << (row * width)
    return slots


def unpack(layout: Layout, total: Sequence[int]) -> list[int]:
    """All data fields of a sum, in the order of `data_fields`."""
    width = layout.packing.field_width
    found = []
    for slot, row in places(layout):
        if len(found) == layout.data_fields:
            break
        found.append((int(total[slot]) >> (row * width)) % 2**width)
    return found


def quantise(
    values: Sequence[float], bits: int, bound: float, uniforms: Sequence[float]
) -> list[int]:
    """Stochastic rounding of one coordinate after the other, with given uniform numbers."""
    levels = 2 ** (bits - 1) - 1
    fields = []
    for value, uniform in zip(values, uniforms, strict=True):
        clipped = min(max(value, -bound), bound)
        level = math.floor(clipped * (levels / bound) + uniform)
        fields.append(min(max(level, -levels), levels) + 2 ** (bits - 1))
    return fields


def dequantise(total: Sequence[int], bits: int, bound: float, contributors: int) -> list[Fraction]:
    """Exact: (field sum - contributors * offset) * R / (2^(b-1) - 1)."""
    step = Fraction(bound) / (2 ** (bits - 1) - 1)
    return [(int(value) - contributors * 2 ** (bits - 1)) * step for value in total]


# --------------------------------------------------------------------------------------- sum tag


def hkdf(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256, sections 2.2 and 2.3."""
    secret = hmac.digest(salt or bytes(32), key, "sha256")
    block, out = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(secret, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def tag_coefficients(key: bytes, header: bytes, state: bytes, count: int) -> list[int]:
    """r: 61 bits of each 8 bytes of AES-256-CTR, counter from zero, block by block with AES-ECB."""
    info = b"fedcore/1 sum tag coefficients\x00" + state
    aes = Cipher(algorithms.AES(hkdf(key, header, info, 32)), modes.ECB()).encryptor()
    stream = b"".join(aes.update(i.to_bytes(16, "big")) for i in range(-(-count // 2)))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 3 for i in range(count)]


def tag_pad(key: bytes, header: bytes, state: bytes, site: str) -> int:
    info = b"fedcore/1 sum tag pad " + site.encode() + b"\x00" + state
    return int.from_bytes(hkdf(key, header, info, 24), "little") % TAG_PRIME


def tag(key: bytes, header: bytes, state: bytes, slots: Sequence[int], site: str) -> int:
    """T_i = pad_i + sum_s r_s v_s mod 2^61 - 1, in Python integers."""
    r = tag_coefficients(key, header, state, len(slots))
    product = sum(a * int(b) for a, b in zip(r, slots, strict=True))
    return (tag_pad(key, header, state, site) + product) % TAG_PRIME


# -------------------------------------------------------------------------------------- headroom


def proves(sites: int, slot_bits: int, modulus: int) -> bool:
    """n noises of 21 and n roundings of 1/2, and one subtraction of 1/2, below half a plaintext step."""
    noise = sites * (21 + Fraction(1, 2)) + Fraction(1, 2)
    return noise < Fraction(modulus, 2 * 2**slot_bits)


def cheapest(bits: int, sites: int, rings: Sequence[tuple[int, int]]) -> Fraction | None:
    """Fewest wire bits per coordinate over all rings (degree, modulus) and fields per slot."""
    width = bits + math.ceil(math.log2(sites))
    prices = [
        Fraction(modulus.bit_length(), k)
        for _, modulus in rings
        for k in range(1, 60)
        # SEAL's plain modulus 2^s has s + 1 bits, at most 60; the tag's field wants slots below 2^60
        if k * width <= 59 and proves(sites, k * width, modulus)
    ]
    return min(prices, default=None)


# ------------------------------------------------------------------------- ring arithmetic by hand


def negacyclic_product(poly: np.ndarray, ternary: Sequence[int], modulus: int) -> list[int]:
    """poly * ternary in Z_q[x]/(x^N + 1), coefficient by coefficient of the ternary factor."""
    total = np.zeros(len(poly), dtype=object)
    wide = poly.astype(object)
    for shift, sign in enumerate(ternary):
        if sign:
            total += sign * np.concatenate((-wide[len(wide) - shift :], wide[: len(wide) - shift]))
    return [int(value) % modulus for value in total]


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


# ----------------------------------------------------------------------------- a whole federation


@dataclass(frozen=True)
class Settings:
    """start: the range before round 1, None to calibrate. FedAvg with step 1, one 0/1 target.

    stayed: {round: the sites in its sum}, none where it was abandoned; all sites in other rounds.
    """

    seed: int
    fold: int
    folds: int
    rounds: int
    bits: int
    start: float | None
    adaptive: bool
    train: TrainPlan
    stayed: dict[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Arm:
    """One number per round for each of the columns of rounds.jsonl; per_site: after the last one."""

    train_loss: list[float | None] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    per_site: list[float] = field(default_factory=list)
    model: np.ndarray | None = None


@dataclass
class Federation:
    """statistics: {name: one number per feature}. ranges, over: of each round."""

    statistics: dict[str, list[float]]
    ranges: list[float]
    over: list[int]
    arms: dict[str, Arm]
    train: list[np.ndarray]

    @property
    def digest(self) -> str:
        return digest(self.arms["federated"].model.astype("<f4"))


def statistics_of(
    sites: Sequence[np.ndarray], ranges: Sequence[tuple[float, float]]
) -> dict[str, list[float]]:
    """PROTOCOL W: 16-bit fixed-point integers of each site's rows, nothing from fewer than 5 values."""
    names = ("mean", "std", "count", "sites", "clipped")
    found: dict[str, list[float]] = {name: [] for name in names}
    for column, (low, high) in enumerate(ranges):
        fixed, contributing, clipped = [], 0, 0
        for features in sites:
            values = [float(v) for v in features[:, column] if not math.isnan(v)]
            if len(values) < 5:
                continue
            contributing += 1
            clipped += sum(v < low or v > high for v in values)
            fixed += [round((min(max(v, low), high) - low) / (high - low) * 65535) for v in values]
        n, total, squares = len(fixed), sum(fixed), sum(v * v for v in fixed)
        step = (high - low) / 65535
        mean = low + (total / n if n else 65535 / 2) * step
        std = math.sqrt((n * squares - total * total) / (n * n)) * step if n else 0.0
        for name, value in zip(names, (mean, std or 1.0, n, contributing, clipped), strict=True):
            found[name].append(value)
    return found


def standardised(rows: Any, scale: dict[str, list[float]], indicated: Sequence[bool]) -> ArrayRows:
    """Row by row: (x - mean) / std, 0 where missing, then a 0/1 column per indicated feature."""
    out = []
    for row in rows.x.numpy():
        known = [
            0.0 if math.isnan(x) else (x - mean) / std
            for x, mean, std in zip(row, scale["mean"], scale["std"], strict=True)
        ]
        flags = [float(math.isnan(x)) for x, wanted in zip(row, indicated, strict=True) if wanted]
        out.append(known + flags)
    x = np.array(out, dtype=np.float64).reshape(len(out), -1).astype(np.float32)
    return ArrayRows(torch.from_numpy(x), rows.y)


def over(values: Sequence[float], bound: float) -> int:
    return sum(abs(value) > bound for value in values)


def first_range(updates: Sequence[Sequence[float]]) -> float:
    """The smallest power of two that at most one coordinate in a thousand exceeds."""
    values = sum(map(len, updates))
    for exponent in range(-16, 8):
        if 1000 * sum(over(update, 2.0**exponent) for update in updates) <= values:
            return 2.0**exponent
    return 2.0**7


def next_range(
    bound: float, beyond: int, beyond_half: int, values: int, first: float, sites: int
) -> float:
    """Twice where more than 1 in 1000 exceeds R, half where fewer than 1 in 100 000 exceed R / 2.

    It doubles only where this holds at two sites or more, and never beyond 4 times the first one.
    """
    if 1000 * beyond > values:
        return min(bound * 2, 4 * first, 2.0**10) if sites >= 2 else bound
    if 100_000 * beyond_half < values:
        return max(bound / 2, 2.0**-20)
    return bound


def federation(
    task: Task,
    sites: Sequence[str],
    ranges: Sequence[tuple[float, float]],
    indicated: Sequence[bool],
    settings: Settings,
) -> Federation:
    """Every arm of one run, from raw arrays, `task.data(site)`, to models and scores.

    The same float64 operations in the same order as PROTOCOL F fixes them, so the federated model is
    the same to the last bit.
    """
    seed = settings.seed
    raw, splits = {}, {}
    for site in sites:
        x, y = task.data(site)
        raw[site] = ArrayRows(torch.from_numpy(x), torch.from_numpy(y))
        split = FoldSplit(seed, settings.fold, settings.folds)
        splits[site] = split.divide(raw[site], site)
    cap = 16
    while cap < max(map(len, raw.values())):
        cap *= 2

    scale = statistics_of([splits[site][0].x.numpy() for site in sites], ranges)
    train = {s: standardised(splits[s][0], scale, indicated) for s in sites}
    test = {s: standardised(splits[s][1], scale, indicated) for s in sites}
    own_train, own_test = {}, {}
    for site in sites:
        own = statistics_of([splits[site][0].x.numpy()], ranges)
        own_train[site] = standardised(splits[site][0], own, indicated)
        own_test[site] = standardised(splits[site][1], own, indicated)
    pooled = ArrayRows(
        torch.cat([train[s].x for s in sites]), torch.cat([train[s].y for s in sites])
    )

    torch.manual_seed(derive_seed(seed, 0, "", "initial model"))
    module = task.model()
    start = flat(module)

    def fit(model: Any, rows: ArrayRows, round_: int, site: str, optimiser: Any = None) -> Any:
        plan = settings.train
        return local_train(
            task, model, rows, plan,
            seed=seed, round_=round_, rounds=settings.rounds, site=site, optimiser=optimiser,
        )  # fmt: skip

    def update(model: np.ndarray, site: str, round_: int) -> tuple[np.ndarray, Any]:
        put(module, model)
        report = fit(module, train[site], round_, site)
        return flat(module) - model, report

    def weight_of(site: str) -> int:
        """Rows to the nearest 32nd of the cap, at least one and never above it."""
        step = max(1, cap // 32)
        steps = math.floor(len(train[site]) / step + 0.5)
        return step * min(max(steps, 1), cap // step)

    def weighted(change: np.ndarray, site: str) -> list[float]:
        return [float(value) * (weight_of(site) / cap) for value in change]

    def shared(model: np.ndarray) -> Callable[[str], Any]:
        put(module, model)
        return lambda site: module

    arms = {name: Arm() for name in ("centralised", "local_only", "federated_float", "federated")}

    # Centralised and local-only: one optimiser for the whole run.
    def momentum_sgd(model: Any) -> Any:
        plan = settings.train
        return torch.optim.SGD(model.parameters(), lr=plan.lr, momentum=plan.momentum)

    centre = copy.deepcopy(module)
    alone = {site: copy.deepcopy(module) for site in sites}
    optimisers = {site: momentum_sgd(alone[site]) for site in sites}
    central = momentum_sgd(centre)
    for round_ in range(1, settings.rounds + 1):
        report = fit(centre, pooled, round_, "", central)
        note(arms["centralised"], task, [report], lambda site: centre, test)
        reports = [fit(alone[s], own_train[s], round_, s, optimisers[s]) for s in sites]
        note(arms["local_only"], task, reports, alone.get, own_test)

    # Float averaging.
    state = start.astype(np.float64)
    for round_ in range(1, settings.rounds + 1):
        model, reports = state.astype(np.float32), []
        total, weight = np.zeros(len(state)), 0
        for site in settings.stayed.get(round_, sites):
            change, report = update(model, site, round_)
            total = total + change.astype(np.float64) * weight_of(site)
            weight += weight_of(site)
            reports.append(report)
        if reports:
            state = state + total / weight
        model = arms["federated_float"].model = state.astype(np.float32)
        note(arms["federated_float"], task, reports, shared(model), test)

    # The federation: integers.
    ranges_, overs = [], []
    parameters = [float(value) for value in start]
    bound = settings.start
    if bound is None:
        updates = [np.array(weighted(update(start, s, 1)[0], s)).astype(np.float32) for s in sites]
        bound = first_range(updates)
    first = bound
    for round_ in range(1, settings.rounds + 1):
        model, reports = np.array(parameters).astype(np.float32), []
        totals, weight, beyond, beyond_half, exceeding = [0] * len(parameters), 0, 0, 0, 0
        stayed = settings.stayed.get(round_, sites)
        for site in stayed:
            change, report = update(model, site, round_)
            values = weighted(change, site)
            uniforms = generator(seed, round_, site, "rounding").random(len(values))
            fields = quantise(values, settings.bits, bound, uniforms)
            totals = [a + b for a, b in zip(totals, fields, strict=True)]
            weight += weight_of(site)
            beyond += over(values, bound)
            beyond_half += over(values, bound / 2)
            exceeding += 1000 * over(values, bound) > len(values)
            reports.append(report)
        step = bound / (2 ** (settings.bits - 1) - 1)
        offset = len(stayed) * 2 ** (settings.bits - 1)
        for place, number in enumerate(totals if stayed else []):
            parameters[place] += (number - offset) * step * (cap / weight)
        ranges_.append(bound)
        overs.append(beyond)
        count = len(stayed) * len(parameters)
        calibrated = settings.adaptive and settings.start is None
        if calibrated and 2 * beyond > count and exceeding == len(stayed) >= 2:
            smallest = first == 2.0**-16
            bound = min(max(4 * bound, 2.0**-6 if smallest else bound), 2.0**10)
            first = max(first, bound)
        elif settings.adaptive and stayed:
            bound = next_range(bound, beyond, beyond_half, count, first, exceeding)
        model = arms["federated"].model = np.array(parameters).astype(np.float32)
        note(arms["federated"], task, reports, shared(model), test)
    raw_train = [splits[site][0].x.numpy() for site in sites]
    return Federation(scale, ranges_, overs, arms, raw_train)


def flat(module: Any) -> np.ndarray:
    return parameters_to_vector(module.parameters()).detach().numpy().copy()


def put(module: Any, vector: np.ndarray) -> None:
    # A copy: the parameters become views of what is given, and training would change it.
    vector_to_parameters(torch.from_numpy(vector.copy()), module.parameters())


@torch.no_grad()
def note(
    arm: Arm, task: Task, reports: Sequence[Any], model_at: Callable[[str], Any], test: dict
) -> None:
    """One round's numbers: training loss over the rows seen, loss and accuracy over all test rows."""
    seen = sum(report.examples for report in reports)
    loss = sum(report.loss * report.examples for report in reports)
    arm.train_loss.append(loss / seen if seen else None)
    losses, right, arm.per_site = 0.0, 0, []
    for site, rows in test.items():
        outputs = model_at(site).eval()(rows.x)
        hits = int((outputs.argmax(1) == rows.y).sum())
        losses += float(task.loss(outputs, rows.y)) * len(rows)
        right += hits
        arm.per_site.append(hits / len(rows))
    count = sum(map(len, test.values()))
    arm.loss.append(losses / count)
    arm.accuracy.append(right / count)
