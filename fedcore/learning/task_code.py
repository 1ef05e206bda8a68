"""Which files make up a task's code: its own, and what they import that nobody else can look up by a version.

A site's operator allows a task by the hash of these files. Libraries in site-packages are left out: they have
versions, and `requirements/` has their hashes. So is Fedcore itself, except for a task inside it.
"""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

OURS = ("fedcore", "fedcore_clients", "fedcore_server")
FROM_A_FILE = "_fedcore_task_"
"""How the private name of a module begins that was loaded from a user's file."""

FLOWER = "flower:"
"""How the name of a task begins that is a Flower app; the rest is the app's folder."""


def files_of(home: str, modules: Iterable[str]) -> list[tuple[str, Path]]:
    """(name, file) of the named modules and of all local packages that they import, each file once.

    home: the module that holds the task, with its package wherever that is installed; modules: others, in
    `sys.modules` too. A name is the path from the package's folder on, and for a single file `task.py`,
    whatever the file is called: the same on every machine. Two files may have one name.
    """
    found: dict[Path, str] = {}
    packages: dict[str, list[tuple[str, Path]]] = {}  # most files import the same few
    queue = [*_loaded(home, anywhere=True)]
    queue += [each for name in modules for each in _loaded(name)]
    while queue:
        name, path = queue.pop()
        if path not in found:
            found[path] = name
            inside = name.startswith("fedcore/")
            for top in frozenset[str]() if inside else _imported(path.read_bytes()):
                if top not in packages:
                    packages[top] = [*_package(top)]
                queue += [each for each in packages[top] if each[1] not in found]
    return [(name, path) for path, name in found.items()]


def _loaded(name: str, *, anywhere: bool = False) -> Iterator[tuple[str, Path]]:
    """The files of a module that is loaded already; none for one without a file."""
    path = Path(getattr(sys.modules.get(name), "__file__", None) or "")
    top = name.partition(".")[0]
    if name.startswith(FROM_A_FILE):
        yield "task.py", path
    elif top in OURS:
        yield f"{name.replace('.', '/')}.py", path
    elif path.suffix == ".py" and (anywhere or _is_local(path)):
        package = hasattr(sys.modules.get(top), "__path__")
        yield from _package(top, anywhere=anywhere) if package else [(f"{top}.py", path)]


def _package(top: str, *, anywhere: bool = False) -> Iterator[tuple[str, Path]]:
    """The files of a top-level module or package; unless anywhere, only of one outside site-packages."""
    spec = None
    if not (top in sys.stdlib_module_names or top in OURS):
        with suppress(ValueError):  # a module that another one made, without a file
            spec = importlib.util.find_spec(top)
    if spec is None:
        return
    folders = spec.submodule_search_locations or ()
    for folder in (Path(each) for each in folders if anywhere or _is_local(Path(each))):
        for path in folder.rglob("*.py"):
            if path.is_file() and (anywhere or _is_local(path)):
                yield f"{top}/{path.relative_to(folder).as_posix()}", path
    if not folders and spec.origin and _is_local(Path(spec.origin)):
        yield f"{top}.py", Path(spec.origin)


def _is_local(path: Path) -> bool:
    return path.exists() and not {"site-packages", "dist-packages"} & set(path.parts)


_IMPORTED: dict[bytes, frozenset[str]] = {}
"""By the hash of a file's content: a digest reads every file, and a run takes two digests."""


def _imported(source: bytes) -> frozenset[str]:
    """The top-level names that a file of this content imports, wherever in it."""
    content = hashlib.sha256(source).digest()
    if content not in _IMPORTED:
        _IMPORTED[content] = frozenset(_imports(source))
    return _IMPORTED[content]


def _imports(source: bytes) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a template in a package: nothing imports it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name.partition(".")[0] for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
