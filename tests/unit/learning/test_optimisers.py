"""Server optimisers against the papers' loops, and the same bits on any thread count or CPU (PROTOCOL F)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import fedcore
from fedcore.errors import UnknownName
from fedcore.learning.optimisers import OPTIMISERS, apply_update, init_state, optimiser_of
from fedcore.secagg.plan import ServerPlan

NAMES = sorted(OPTIMISERS)
DEFAULTS = 0.9, 0.99, 1e-3  # Reddi et al. 2021, section 5
OTHERS = [
    {"correction": "none"},
    {"correction": "flower"},
    {"correction": "flower", "beta1": 0.5, "beta2": 0.6, "tau": 0.1},
    {"beta1": 0.0, "beta2": 0.3, "tau": 1e-2},
]


class Textbook:
    """One coordinate, Python floats, the algorithms as printed."""

    def __init__(self, plan: ServerPlan, start: float) -> None:
        self.plan, self.x, self.t = plan, start, 0
        self.velocity = self.m = self.v = 0.0

    def step(self, delta: float) -> None:
        plan, self.t = self.plan, self.t + 1
        if plan.optimiser == "fedavg":  # McMahan et al. 2017: x <- x + lr mean
            self.x += plan.lr * delta
        elif plan.optimiser == "fedavgm":  # Hsu et al. 2019: v <- beta v + mean; x <- x + lr v
            self.velocity = plan.momentum * self.velocity + delta
            self.x += plan.lr * self.velocity
        else:  # Reddi et al. 2021, algorithm 2
            square, beta1, beta2 = delta * delta, plan.beta1, plan.beta2
            self.m = beta1 * self.m + (1 - beta1) * delta
            if plan.optimiser == "fedadam":
                self.v = beta2 * self.v + (1 - beta2) * square
            elif plan.optimiser == "fedadagrad":
                self.v += square
            else:
                # Bit for bit as the code has it: v may equal the square up to one ulp (0.01 is not
                # 1 - 0.99), and then the last bit decides the sign, and with it the whole step.
                sign = math.copysign(self.v != square, self.v - square)
                self.v -= sign * square * (1 - beta2)
            m_hat, v_hat, rate = self.m, self.v, plan.lr
            if plan.correction == "adam" and plan.optimiser != "fedadagrad":  # Kingma and Ba 2015
                m_hat, v_hat = self.m / (1 - beta1**self.t), self.v / (1 - beta2**self.t)
            elif plan.correction == "flower" and plan.optimiser != "fedadagrad":  # flwr's FedAdam
                after = self.t + 1
                rate = plan.lr * math.sqrt(1 - beta2**after) / (1 - beta1**after)
            self.x += rate * m_hat / (math.sqrt(v_hat) + plan.tau)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("lr", [1.0, 0.1])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@example(start=0.0, deltas=[0.5, 0.05])
@given(
    start=st.floats(-2, 2, width=32),
    deltas=st.lists(st.floats(-1, 1), min_size=1, max_size=12),
)
def test_every_optimiser_is_the_textbook(name, lr, momentum, start, deltas):
    plan = ServerPlan(name, lr, momentum)
    state = init_state(np.array([start], dtype=np.float32), 1, plan, 0.5)
    slow = Textbook(plan, start)
    for delta in deltas:
        state = apply_update(state, np.array([delta]), 1, plan)
        slow.step(delta)
    assert state.parameters[0] == pytest.approx(slow.x, rel=1e-9, abs=1e-12)
    assert state.bound == 0.5


def ten_rounds_are_the_textbook(plan, seed):
    rng = np.random.default_rng(seed)
    state = init_state(np.array([0.25], dtype=np.float32), 1, plan, 0.5)
    slow = Textbook(plan, 0.25)
    for delta in rng.normal(scale=0.1, size=10):
        state = apply_update(state, np.array([delta]), 1, plan)
        slow.step(float(delta))
        assert state.parameters[0] == pytest.approx(slow.x, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_ten_rounds_of_ordinary_updates_are_the_textbook(name):
    """Fixed numbers, for what random ones may miss."""
    ten_rounds_are_the_textbook(ServerPlan(name, 0.3, 0.9), seed=8)


def test_the_constants_are_those_of_the_paper():
    plan = ServerPlan()
    assert (plan.beta1, plan.beta2, plan.tau) == DEFAULTS


@pytest.mark.parametrize("other", OTHERS, ids=str)
@pytest.mark.parametrize("name", ["fedadam", "fedyogi", "fedadagrad"])
def test_other_constants_and_corrections_are_the_textbook(name, other):
    ten_rounds_are_the_textbook(ServerPlan(name, 0.3, **other), seed=9)


def test_an_unknown_correction_is_refused_by_name():
    with pytest.raises(UnknownName, match="server_correction"):
        ServerPlan("fedadam", correction="adm")


def run_rounds(name: str, rounds: int = 5):
    plan = ServerPlan(name, 0.3)
    rng = np.random.default_rng(6)
    state = init_state(rng.normal(size=1000).astype(np.float32), 900, plan, 1.0)
    for _ in range(rounds):
        state = apply_update(state, rng.normal(size=1000) * 0.01, 900, plan)
    return state


@pytest.mark.parametrize("name", NAMES)
def test_buffers_take_the_plain_mean(name):
    plan = ServerPlan(name, 0.3)
    state = init_state(np.arange(5, dtype=np.float32), 3, plan, 1.0)
    for _ in range(3):
        state = apply_update(state, np.full(5, 0.5), 3, plan)
    assert state.parameters[3:].tolist() == [4.5, 5.5]
    assert not (state.parameters[:3] == np.arange(3) + 1.5).any()
    assert all(len(moment) == 3 for moment in state.moments.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_step_changes_nothing_it_was_given(name):
    state = run_rounds(name, 2)
    before = state.canonical()
    mean = np.full(1000, 0.25)
    apply_update(state, mean, 900, ServerPlan(name))
    assert state.canonical() == before
    assert (mean == 0.25).all()


@pytest.mark.parametrize("name", NAMES)
def test_state_is_float64_and_the_model_one_cast(name):
    state = run_rounds(name)
    assert state.parameters.dtype == np.float64
    assert all(moment.dtype == np.float64 for moment in state.moments.values())
    assert state.model.dtype == np.float32
    assert (state.model == state.parameters.astype(np.float32)).all()


def test_yogi_without_change_stays_finite_and_second_moments_never_go_negative():
    plan = ServerPlan("fedyogi")
    state = init_state(np.zeros(4, dtype=np.float32), 4, plan, 1.0)
    for mean in (np.zeros(4), np.array([1.0, -1.0, 0.0, 1e-8]), np.zeros(4), np.full(4, 5.0)):
        state = apply_update(state, mean, 4, plan)
        assert np.isfinite(state.parameters).all()
        assert (state.moments["second"] >= 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_the_state_is_in_its_canonical_bytes(name):
    state = run_rounds(name)
    assert state.canonical() == run_rounds(name).canonical()
    changed = [
        replace(state, parameters=state.parameters + np.eye(1, 1000, 999)[0] * 1e-12),
        replace(state, bound=2.0),
        *(
            replace(state, moments=dict(state.moments) | {key: moment * (1 + 1e-15)})
            for key, moment in state.moments.items()
        ),
        *(replace(state, scalars=dict(state.scalars) | {key: 0.5}) for key in state.scalars),
    ]
    assert len({s.canonical() for s in [state, *changed]}) == len(changed) + 1
    expected = 2 + len(state.moments) + len(state.scalars)
    assert len(changed) == expected


def test_canonical_bytes_are_little_endian_with_lengths():
    plan = ServerPlan("fedadam")
    state = init_state(np.array([1.5], dtype=np.float32), 1, plan, 0.25)

    def part(*values):
        raw = np.array(values, dtype="<f8").tobytes()
        return len(raw).to_bytes(8, "little") + raw

    # parameters, first, second, beta1, beta2, range and first range
    expected = part(1.5) + part(0.0) * 2 + part(1.0) * 2 + part(0.25, 0.25)
    assert state.canonical() == expected


def test_an_unknown_optimiser_is_refused_with_the_nearest():
    with pytest.raises(UnknownName) as unknown:
        optimiser_of(ServerPlan("fedadm"))
    assert unknown.value.remedy == "did you mean 'fedadam'?"


DIGEST = """
    import hashlib, sys
    import numpy as np
    import torch  # the process of a real site: its kernels and threads are there, and must not matter
    from fedcore.learning.optimisers import OPTIMISERS, apply_update, init_state
    from fedcore.secagg.encode.quantise import dequantise
    from fedcore.secagg.plan import ServerPlan

    torch.ones(300_000).sqrt_()  # starts the thread pool
    bits, bound, sites, size = 16, 0.37, 5, 100_003
    rng = np.random.Generator(np.random.Philox(9))
    digest = hashlib.sha256()
    for name in sorted(OPTIMISERS):
        plan = ServerPlan(name, 0.7)
        state = init_state(rng.random(size).astype(np.float32), size - 3, plan, bound)
        for _ in range(3):
            total = rng.integers(sites, sites << bits, size, dtype=np.uint64)
            sums = dequantise(total, bits, bound, sites)
            digest.update(sums.tobytes())
            state = apply_update(state, sums * (512 / 736), size - 3, plan)
        digest.update(state.canonical() + state.model.tobytes())
    print(digest.hexdigest())
"""


def dispatched_features() -> str:
    """Every instruction set NumPy chooses at run time on this CPU."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    return " ".join(name for name in __cpu_dispatch__ if __cpu_features__.get(name))


def test_dequantised_sums_and_server_steps_have_the_same_bits_everywhere():
    """1 or 2 threads, PyTorch's plainest kernels, and NumPy without any of its wide ones."""
    settings_ = [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default"},
        {"OMP_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": dispatched_features()},
    ]
    root = str(Path(fedcore.__file__).parents[1])
    digests = []
    for setting in settings_:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(DIGEST)],
            env=os.environ | {"PYTHONPATH": root} | setting,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        digests.append(done.stdout.strip())
    assert len(set(digests)) == 1
    assert len(digests[0]) == 64
