"""`fedcore doctor`: versions, the SEAL self-test, name clashes."""

import importlib.util
from importlib.metadata import distributions

from fedcore.errors import FedcoreError
from fedcore.experiment.environment import environment


def examine() -> list[tuple[str, bool, str, str]]:
    """(name, whether it is well, what was found, remedy) of each check, in the order of the output."""
    facts = environment()
    keys = ("fedcore", "python", "torch", "numpy", "platform", "cpu", "cores")
    events = "runs write its events" if _there("tensorboard") else "not installed (optional)"
    clash = any((each.metadata["Name"] or "").lower() == "fedcore" for each in distributions())
    names = ("another" if clash else "no other") + " distribution owns `fedcore`"
    shells = ("fedcore_server", "fedcore_clients")
    missing = ", ".join(name for name in shells if not _there(name))
    found = f"not importable: {missing}" if missing else ", ".join(shells)
    again = "install fedcore-fl again"
    return [
        *((key, True, str(facts[key]), "") for key in keys),
        _seal(),
        ("tensorboard", True, events, ""),
        ("names", not clash, names, f"pip uninstall fedcore, then {again}"),
        ("packages", not missing, found, again),
    ]


def _there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _seal() -> tuple[str, bool, str, str]:
    from fedcore.secagg.crypto.bfv import self_test

    try:
        found = self_test()
    except FedcoreError as error:
        return "SEAL", False, str(error), error.remedy
    except Exception as error:  # noqa: BLE001 - a broken library may raise anything
        return "SEAL", False, f"{type(error).__name__}: {error}", "reinstall tenseal"
    version = f"tenseal {environment()['tenseal']}"
    if not found["exact"]:
        return "SEAL", False, f"{version}: encrypted sums are WRONG", "do not use it"
    return "SEAL", True, f"{version}: encrypted sum exact, through a {found['path']}", ""
