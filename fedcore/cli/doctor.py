"""`fedcore doctor`: versions, the SEAL self-test, name clashes."""

import importlib.util
from dataclasses import dataclass
from importlib.metadata import distributions

from fedcore.errors import FedcoreError
from fedcore.experiment.environment import environment


@dataclass(frozen=True)
class SelfTest:
    """One line of the output. ok: False makes the command exit with 3."""

    name: str
    ok: bool
    found: str
    remedy: str = ""


def examine() -> list[SelfTest]:
    """All checks, in the order of the output."""
    facts = environment()
    keys = ("fedcore", "python", "torch", "numpy", "platform", "cpu", "cores")
    there = importlib.util.find_spec("tensorboard") is not None
    events = "runs write its events" if there else "not installed (optional)"
    return [
        *(SelfTest(key, True, str(facts[key])) for key in keys),
        _seal(),
        SelfTest("tensorboard", True, events),
        _distribution_clash(),
        _module_clash(),
    ]


def _seal() -> SelfTest:
    from fedcore.secagg.crypto.bfv import self_test

    try:
        found = self_test()
    except FedcoreError as error:
        return SelfTest("SEAL", False, str(error), error.remedy)
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything
        return SelfTest("SEAL", False, f"{type(error).__name__}: {error}", "reinstall tenseal")
    version = f"tenseal {environment()['tenseal']}"
    if not found["exact"]:
        return SelfTest("SEAL", False, f"{version}: encrypted sums are WRONG", "do not use it")
    return SelfTest("SEAL", True, f"{version}: encrypted sum exact, through a {found['path']}")


def _distribution_clash() -> SelfTest:
    if any((each.metadata["Name"] or "").lower() == "fedcore" for each in distributions()):
        return SelfTest(
            "names", False, "another distribution named `fedcore` is installed",
            "pip uninstall fedcore, then install fedcore-fl again",
        )  # fmt: skip
    return SelfTest("names", True, "no other distribution owns `fedcore`")


def _module_clash() -> SelfTest:
    wanted = ("fedcore_server", "fedcore_clients")
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        found = f"not importable: {', '.join(missing)}"
        return SelfTest("packages", False, found, "install fedcore-fl again")
    return SelfTest("packages", True, ", ".join(wanted))
