"""Which files make up a task's code: its own, and what they import that nobody else can look up by a version.

A site's operator allows a task by the hash of these files. What is installed in site-packages is left out: it has a
version, and `requirements/` has its hash. So is Fedcore itself, except for a task inside it.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

FROM_A_FILE = "_fedcore_task_"
"""How the private name of a module begins that was loaded from a user's file."""


def files_of(modules: Iterable[str]) -> list[tuple[str, Path]]:
    """(name, file) of the named modules and of all local packages that they import, in order of the names.

    modules: names in `sys.modules`. A name is the path from the package's folder on, and for a single
    file `task.py`, whatever the file is called: the same on every machine.
    """
    found: dict[str, Path] = {}
    queue = [each for name in sorted(modules) for each in _loaded(name)]
    while queue:
        name, path = queue.pop()
        if path not in found.values():
            found[name] = path
            inside = name.startswith("fedcore/")
            tops = set[str]() if inside else _imported(path)
            queue += [each for top in tops for each in _installed(top)]
    return sorted(found.items())


def _loaded(name: str) -> Iterator[tuple[str, Path]]:
    """The files of a module that is loaded already; none for one without a file, or in site-packages."""
    path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    if name.startswith(FROM_A_FILE):
        yield "task.py", path
    elif name.startswith("fedcore."):
        yield f"{name.replace('.', '/')}.py", path
    elif path.suffix == ".py" and _is_local(path):
        top = name.partition(".")[0]
        package = hasattr(sys.modules.get(top), "__path__")
        yield from _installed(top) if package else [("task.py", path)]


def _installed(top: str) -> Iterator[tuple[str, Path]]:
    """The files of a top-level module or package that this machine's owner wrote; none for any other."""
    spec = None
    if not (top in sys.stdlib_module_names or top.startswith("fedcore")):
        with suppress(ValueError):  # a module that another one made, without a file
            spec = importlib.util.find_spec(top)
    if spec is None:
        return
    for folder in spec.submodule_search_locations or ():
        for path in sorted(Path(folder).rglob("*.py")):
            if _is_local(path):
                yield f"{top}/{path.relative_to(folder).as_posix()}", path
    if not spec.submodule_search_locations and spec.origin and _is_local(Path(spec.origin)):
        yield f"{top}.py", Path(spec.origin)


def _is_local(path: Path) -> bool:
    return path.is_file() and not {"site-packages", "dist-packages"} & set(path.parts)


def _imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    found = set[str]()
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a template in a package: nothing imports it
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found
