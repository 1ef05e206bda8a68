"""What every test runs under: one thread per library, no network, no picture windows, no colours.

Set before anything imports torch or numpy, and inherited by the commands that tests start.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import types
from functools import partial

# A suite that a script starts in its background ignores Ctrl-C, and so would every command it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.update(
    {
        # Two test processes on two cores; and determinism is promised per thread count (PROTOCOL F).
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        # rich and typer wrap and colour by these; tests read plain, wide text.
        "NO_COLOR": "1",
        "TERM": "dumb",
        "COLUMNS": "120",
    }
)
os.environ.pop("FORCE_COLOR", None)
# Dozens of processes import the packages: they are compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
from hypothesis import HealthCheck, settings

# No deadlines: a shared machine's slow moment is not a failure. In CI the examples are the same on
# every run, so that a red build means a change; at a desk they vary and keep what they found.
settings.register_profile("desk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "desk")
sys.dont_write_bytecode = False


def in_memory(folder, gigabytes=6):
    """Whether this folder is there with so much room, for programs too."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    room = found.f_bavail * found.f_frsize >= gigabytes << 30
    return room and os.access(folder, os.W_OK) and not found.f_flag & getattr(os, "ST_NOEXEC", 0)


# Journals wait for the disk a hundred thousand times; no test takes the machine's power away.
if in_memory("/dev/shm"):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


@pytest.fixture
def stand_in(monkeypatch):
    """stand_in(owner, check_a=other): for the rest of the test, `other` runs where this function of a module (or its
    name), class or object is called.

    Of a machine's package every module that uses the function is patched (support/machines.py). The test
    fails if what stands in is never called: a test that does not get as far as that shows nothing.
    """
    from support.machines import patch_machine

    uncalled = set()

    def replace(owner, **others):
        owner = importlib.import_module(owner) if isinstance(owner, str) else owner
        machine = isinstance(owner, types.ModuleType) and hasattr(owner, "__path__")
        patch = partial(patch_machine, monkeypatch) if machine else monkeypatch.setattr
        for name, other in others.items():

            def called(*args, name=name, other=other, **more):
                uncalled.discard(name)
                return other(*args, **more)

            uncalled.add(name)
            patch(owner, name, called)

    yield replace
    assert not uncalled, f"replaced, and never called: {sorted(uncalled)}"


@pytest.fixture
def without(stand_in):
    """without(owner, "check_a", check_b=other): `stand_in` for a test's positive control, in which these
    functions do nothing."""

    def switch_off(owner, *names, **others):
        stand_in(owner, **dict.fromkeys(names, lambda *_, **__: None) | others)

    return switch_off


@pytest.fixture
def flower_task(monkeypatch):
    """This process as a task that Flower started: task, run and node 7."""
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 7)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files of a new federation, whose passphrase costs little to check."""
    from tests.support.federations import new_federation
    from tests.support.keystores import cheap_scrypt

    cheap_scrypt(monkeypatch)
    return new_federation(tmp_path / "federation")


@pytest.fixture
def va(files, tmp_path):
    """The folder of a site that has joined it."""
    from tests.support.live_sessions import joined

    return joined(files, tmp_path / "va")


LONGEST = (
    "test_contract.py", "test_crash_points.py", "test_readme.py", "test_transfer.py", "test_chaos.py",
    "test_restarts.py", "test_up.py", "test_traffic.py", "test_tutorials.py", "test_rounds.py",
    "test_hostile_coordinator.py", "test_folding.py", "test_absences.py", "test_report_page.py", "test_given_model.py",
    "test_run.py", "test_commands.py", "test_keys_end.py", "test_patients.py", "test_journal_replay.py",
    "test_docs_site.py", "test_hostile_site.py", "test_load.py", "test_journal.py", "test_wheel.py",
    "test_new_federation.py", "test_simulation.py", "test_failover.py", "test_faults.py", "test_postgresql.py",
    "test_lying_site_steers.py", "test_encrypted_sites.py", "test_whole_jobs.py",
    "test_repository.py", "test_demo_deployed.py", "test_reference_run.py", "test_wire_frames.py",
    "test_report_browser.py", "test_sandbox.py", "test_extras.py",
)  # fmt: skip
"""Files that take more than some twenty seconds, the longest first."""


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is loaded stays, and so do the tests: the garbage collector does not visit it, now and later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """A test process of xdist is not told how tests are dealt; its collection is the order in which they are."""
    node.workerinput["dealt"] = node.config.option.dist


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out short forms of slow tests that run; whole files to a process: begin with the longest."""
    if "not slow" not in config.option.markexpr:
        brief = [item for item in items if item.get_closest_marker("brief")]
        config.hook.pytest_deselected(items=brief)
        items[:] = [item for item in items if item not in brief]
    if getattr(config, "workerinput", {}).get("dealt") == "loadfile":
        place = {name: number for number, name in enumerate(LONGEST)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL server of this test process; skips where there is none to start."""
    from support.postgres import Server, missing

    if reason := missing():
        pytest.skip(reason)
    server = Server()
    yield server
    server.end()
