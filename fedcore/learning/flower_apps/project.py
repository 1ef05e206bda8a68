"""A Flower app's folder: what its pyproject.toml declares, and its two components.

Invariant: the app's package is imported from its own folder or not at all: a package of that name from elsewhere is
refused.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from fedcore.errors import BadInput, TaskFailed
from fedcore.files.toml import read_tables
from fedcore.learning.model import seeded
from fedcore.learning.task import user_traceback

ConfigValue = bool | int | float | str
RunConfig = Mapping[str, ConfigValue]

PROJECT = "pyproject.toml"
_COMPONENTS = ("serverapp", "clientapp")
_COMPONENT = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_imported: dict[str, Path] = {}
"""{top-level package of an app: the app's folder}, of this process."""


@dataclass(frozen=True)
class Project:
    """folder: absolute. name: of [project]. config: of [tool.flwr.app.config], nested tables as dotted names.
    components: {serverapp, clientapp: `module:attribute`}. sites: number of simulated SuperNodes it asks for, or None.
    """

    folder: Path
    name: str
    config: RunConfig
    components: Mapping[str, str]
    sites: int | None

    def load(self, component: str) -> Any:
        """The object that a component names. Raises BadInput and TaskFailed."""
        where = f"{self.folder / PROJECT}: tool.flwr.app.components.{component}"
        module_name, _, attribute = self.components[component].partition(":")
        module = self._module(module_name, where)
        try:
            return attrgetter(attribute)(module)
        except AttributeError as error:
            raise BadInput(
                f"{where}: found no {attribute!r} in {module_name}, expected the {component}",
                remedy=f'{component} = "{module_name}:app", where `app` is made',
            ) from error

    def _module(self, name: str, where: str) -> Any:
        top = name.partition(".")[0]
        self._forget_another(top)
        if str(self.folder) not in sys.path:
            sys.path.append(str(self.folder))  # also for what the app imports while it runs
        importlib.invalidate_caches()
        try:
            with seeded(0, 0, "", "import"):
                module = importlib.import_module(name)
        except (Exception, SystemExit) as error:
            self._forget(top, self.folder)
            if isinstance(error, ModuleNotFoundError) and name.startswith(error.name or name):
                raise BadInput(
                    f"{where}: found no module {name!r} in {self.folder}",
                    remedy="the app's folder has pyproject.toml and beside it the package that it names",
                ) from error
            raise TaskFailed(
                f"Flower app {self.name}: {name} raised {type(error).__name__} while it was imported",
                user_traceback=user_traceback(error),
                remedy="its dependencies (project.dependencies) are installed by you: pip install PATH"
                if isinstance(error, ImportError)
                else "",
            ) from error
        if self.folder not in Path(module.__file__ or "").resolve().parents:
            raise BadInput(
                f"{where}: found {name!r} in {module.__file__}, expected it in {self.folder}",
                remedy="give the app's package a name that no installed package has",
            )
        _imported[top] = self.folder
        return module

    def _forget_another(self, top: str) -> None:
        """Unload a package of the same name that another app of this process brought."""
        other = _imported.get(top)
        if other is not None and other != self.folder:
            self._forget(top, other)

    def _forget(self, top: str, folder: Path) -> None:
        """Unload what a folder brought of a package, and take the folder from where modules are looked for."""
        for name, module in list(sys.modules.items()):
            of_package = name == top or name.startswith(top + ".")
            if of_package and folder in Path(getattr(module, "__file__", None) or "").parents:
                del sys.modules[name]
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def read_project(folder: Path) -> Project:
    """What the folder declares. Raises BadInput where it is no Flower app, or one of a newer flwr."""
    folder, file = folder.resolve(), folder.resolve() / PROJECT
    if not file.is_file():
        raise BadInput(
            f"--flower-app: found no {PROJECT} in {folder}, expected a Flower app",
            remedy="the folder that `flwr run` takes",
        )
    tables = read_tables(file)
    app = _table(tables, "tool", "flwr", "app")
    components = {key: _table(app, "components").get(key) for key in _COMPONENTS}
    for key, value in components.items():
        if not isinstance(value, str) or not _COMPONENT.fullmatch(value):
            raise BadInput(
                f"{file}: found {'none' if value is None else repr(value)} as tool.flwr.app.components.{key}, "
                "expected 'module:attribute'",
                remedy=f'[tool.flwr.app.components] {key} = "package.{key[:6]}_app:app"',
            )
    project = _table(tables, "project")
    _refuse_newer(project.get("dependencies", ()), file)
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in str(project.get("name", "")))
    return Project(
        folder, name or "flower-app", _flat(_table(app, "config"), file),
        {key: str(value) for key, value in components.items()}, _sites(tables),
    )  # fmt: skip


def _table(tables: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    found: Any = tables
    for key in path:
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    return found if isinstance(found, Mapping) else {}


def _flat(table: Mapping[str, Any], file: Path, prefix: str = "") -> dict[str, ConfigValue]:
    """Flower's own reading of nested tables: `a = {b = 1}` is `a.b`."""
    found: dict[str, ConfigValue] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= _flat(value, file, f"{prefix}{key}.")
        elif isinstance(value, ConfigValue):
            found[prefix + key] = value
        else:
            raise BadInput(
                f"{file}: found {type(value).__name__} in tool.flwr.app.config.{prefix}{key}, "
                "expected a number, a text, true or false",
                remedy="Flower's run config has no lists and dates",
            )
    return found


def _sites(tables: Mapping[str, Any]) -> int | None:
    """`options.num-supernodes` of the default federation, where pyproject.toml has one (flwr < 1.26 read it there)."""
    federations = _table(tables, "tool", "flwr", "federations")
    chosen = _table(federations, str(federations.get("default", "")), "options")
    found = chosen.get("num-supernodes")
    return found if isinstance(found, int) and found > 0 else None


def _refuse_newer(dependencies: Any, file: Path) -> None:
    """Raise BadInput where the app asks for another flwr than the installed one."""
    have = version("flwr")
    for text in dependencies if isinstance(dependencies, list) else ():
        try:
            wanted = Requirement(str(text))
        except InvalidRequirement:
            continue  # of a kind that pip does not take either
        if canonicalize_name(wanted.name) == "flwr" and not wanted.specifier.contains(
            have, prereleases=True
        ):
            raise BadInput(
                f"{file}: found the dependency {text!r}, and flwr {have} is installed",
                remedy=f"pip install '{wanted.name}{wanted.specifier}', where fedcore's extra `flower` allows it",
            )
