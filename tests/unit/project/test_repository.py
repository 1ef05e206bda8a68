"""The repository keeps its own promises: versions, names, links, pins, the direction of imports."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OURS = ("fedcore", "server", "clients", "tests", "scripts", "docs", "deploy", ".ci")

# The public names. Adding one is a decision, removing one breaks somebody: change both places.
PUBLIC = {
    "Comparison",
    "FedcoreError",
    "Run",
    "STOP",
    "Task",
    "category",
    "compare",
    "group",
    "grouped",
    "linear",
    "load",
    "load_task",
    "number",
    "simulate",
    "split",
    "table",
}


def files(*suffixes: str) -> list[Path]:
    """Our own text files with one of these suffixes, wherever git would look."""
    # `.git` is a file, with a path of this machine in it, where the checkout is a linked one.
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    for folder in OURS:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return sorted(
        path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts
    )


def test_one_version_everywhere():
    import fedcore

    version = PYPROJECT["project"]["version"]
    assert fedcore.__version__ == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE).group(1) == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_public_names_are_guarded():
    import fedcore

    assert set(fedcore.__all__) - {"__version__"} == PUBLIC
    for name in fedcore.__all__:
        assert getattr(fedcore, name) is not None, name
        assert name in dir(fedcore), name


def test_no_module_hides_a_public_function():
    """`import fedcore.load` would rebind `fedcore.load`: no submodule may bear a public name."""
    modules = {path.stem for path in (ROOT / "fedcore").glob("*.py")}
    packages = {path.parent.name for path in (ROOT / "fedcore").glob("*/__init__.py")}
    assert not (modules | packages) & {name for name in PUBLIC if name.islower()}


@pytest.mark.parametrize(
    "module", ["fedcore", "fedcore_clients.app", "fedcore_server.app", "fedcore_server.fold_worker"]
)
def test_what_trains_nothing_imports_no_torch(module):
    """The facade (`--help` comes at once), a site's session and the coordinator: torch takes seconds and
    200 MB, and belongs in the process that trains."""
    code = f"import {module}, sys; print([m for m in ('torch', 'pandas', 'tenseal') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_package_is_in_the_wheel():
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    folders = {"fedcore": "fedcore", "fedcore_server": "server", "fedcore_clients": "clients"}
    present = set()
    for package, folder in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inside = init.parent.relative_to(ROOT / folder).parts
            present.add(".".join((package, *inside)))
    assert listed == present
    for folder in folders.values():
        assert (ROOT / folder / "py.typed").is_file()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins), pins
    pairs = [pin.split("==") for pin in pins]
    assert len(pairs) == len({canonicalize_name(name) for name, _ in pairs}), "a package twice"
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    found = [Requirement(line) for line in project["dependencies"] + extras]
    return [
        each for each in found if each.name != project["name"]
    ]  # an extra may name others of ours


def test_pins_satisfy_the_ranges():
    pins = constraints()
    for requirement in requirements():
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name}: no pin in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement}: pinned to {version}"
    assert pins["torch"] == "2.13.0"  # without a local version, or no index but one would have it


def test_flower_stays_an_extra():
    names = {
        canonicalize_name(Requirement(line).name) for line in PYPROJECT["project"]["dependencies"]
    }
    assert "flwr" not in names


def imported(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("server", {"fedcore_clients", "clients", "server"}),
        ("clients", {"fedcore_server", "server", "clients"}),
        ("fedcore", {"fedcore_server", "fedcore_clients", "server", "clients", "grpc"}),
    ],
)
def test_imports_point_one_way(folder, forbidden):
    for path in (ROOT / folder).rglob("*.py"):
        assert not imported(path) & forbidden, path


def test_one_door_per_library():
    for path in (ROOT / "fedcore").rglob("*.py"):
        inside = path.relative_to(ROOT / "fedcore").as_posix()
        if "torch" in imported(path):
            assert inside.startswith("learning/"), f"{inside} imports torch"
        if "tenseal" in imported(path):
            doors = {"secagg/crypto/bfv.py", "secagg/crypto/ckks.py"}
            assert inside in doors, f"{inside} imports tenseal"
        if "asyncio" in imported(path):
            assert inside.startswith("runtime/"), f"{inside} imports asyncio"


def test_every_module_has_a_layer():
    """import-linter asks this of direct children of one package only; ours are named at two depths."""
    contracts = PYPROJECT["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["name"].startswith("inside fedcore"))
    assert len(layers) == 8
    named = [name for layer in layers for name in re.split(r" [:|] ", layer)]
    assert len(named) == len(set(named))
    for path in (ROOT / "fedcore").rglob("*.py"):
        if path in {ROOT / "fedcore/__init__.py", ROOT / "fedcore/secagg/__init__.py"}:
            continue  # the public names, imported on demand; a docstring
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found = [name for name in named if f"{module}.".startswith(f"{name}.")]
        assert len(found) == 1, f"{module}: layers {found}"


def prose(path: Path) -> str:
    """A page of Markdown without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> list[str]:
    """What a link to a part of this page may name: headings, spelled as code hosts do, and explicit ids."""
    text = prose(path)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
    return slugs + re.findall(r'<a id="([^"]+)"></a>', text)


def broken_link(path: Path, target: str) -> str:
    """Why a relative link from this file leads nowhere, or ""."""
    place, _, anchor = target.partition("#")
    page = (path.parent / place).resolve() if place else path
    if not page.exists():
        return f"{path.relative_to(ROOT)}: {target}"
    found = anchors(page).count(anchor) if anchor and page.suffix == ".md" else 1
    return "" if found == 1 else f"{path.relative_to(ROOT)}: {target} ({found} such anchors)"


def test_links_in_the_docs_resolve():
    links = [
        (path, target)
        for path in files(".md")
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(path))
        if not re.match(r"[a-z]+:", target)
    ]
    assert len(links) > 50
    assert not [broken for link in links if (broken := broken_link(*link))]


def test_pages_named_in_the_code_exist():
    """Docstrings, comments and hints name a page of the docs by its path from the root."""
    named = [
        (path, target)
        for path in files(".py", ".toml")
        for target in re.findall(r"\bdocs/[\w/-]+\.md(?:#[\w-]+)?", path.read_text())
    ]
    assert len(named) > 10
    assert not [
        f"{path}: {target}" for path, target in named if broken_link(ROOT / "README.md", target)
    ]


def missing_paths(text: str, *bases: Path) -> list[str]:
    """Files and folders that a page names in back-ticks and no base has: `fedcore/secagg/plan.py`, `data/`."""
    named = re.findall(r"`([\w./-]+(?:/|\.py))`", text)
    return [name for name in named if not any((base / name).exists() for base in bases)]


def test_modules_named_in_the_glossary_exist():
    text = (ROOT / "docs" / "glossary.md").read_text()
    entries = re.findall(r"^- (.*)$", text, re.MULTILINE)
    assert len(entries) > 80
    assert not [entry for entry in entries if not re.search(r"`\w+/[\w/]+\.py`", entry)]
    terms = [re.search(r"\*\*(.+?)\*\*", entry).group(1).casefold() for entry in entries]
    assert terms == sorted(terms)
    assert not missing_paths(text, ROOT)


def test_modules_named_on_the_map_exist():
    """Its tables name modules from `fedcore/` on."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert not missing_paths(text, ROOT, ROOT / "fedcore")
    assert missing_paths("`fedcore/nowhere.py` and `errors.py`", ROOT, ROOT / "fedcore") == [
        "fedcore/nowhere.py"
    ]


def test_modules_named_in_the_code_exist():
    """A docstring names a module by the end of its path: `wire/frames.py`."""
    paths = [f"/{path.relative_to(ROOT)}" for path in files(".py", ".md")]
    sources = [
        p for p in files(".py") if p.relative_to(ROOT).parts[0] in {"fedcore", "server", "clients"}
    ]
    named = [
        (path, name)
        for path in sources
        for name in re.findall(r"`([\w/]+\.py)`", path.read_text())
        if name != "server.py"  # a user's own file
    ]
    assert len(named) > 50
    assert not [
        f"{path.relative_to(ROOT)}: {name}"
        for path, name in named
        if not any(each.endswith(f"/{name}") for each in paths)
    ]


RULE = r"(?:[A-Z]|Headroom)\b"
CITATION = re.compile(rf"\bPROTOCOL\b(?: ({RULE}(?:(?:, | and ){RULE})*))?")


def cited_rules(text: str) -> list[str]:
    """The anchors in docs/protocol.md that a text cites; a citation of any other form is `rule-?`."""
    lists = [re.split(", | and ", found or "?") for found in CITATION.findall(text)]
    return [f"rule-{rule.lower()}" for rules in lists for rule in rules]


def test_every_cited_rule_of_the_protocol_has_its_anchor():
    """`PROTOCOL R` in code, tests and docs is `#rule-r` of docs/protocol.md."""
    known = anchors(ROOT / "docs" / "protocol.md")
    assert len(known) == len(set(known)), "an anchor twice"
    sources = [path for path in files(".py", ".md", ".toml") if path != Path(__file__)]
    cited = [(path, rule) for path in sources for rule in cited_rules(path.read_text())]
    assert len(cited) > 100
    assert not [f"{path.relative_to(ROOT)}: {rule}" for path, rule in cited if rule not in known]


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("(PROTOCOL R)", ["rule-r"]),
        ("PROTOCOL H, V, attack 6", ["rule-h", "rule-v"]),
        ("PROTOCOL W and Q say", ["rule-w", "rule-q"]),
        ("(PROTOCOL Headroom).", ["rule-headroom"]),
        ("(PROTOCOL s3)", ["rule-?"]),
        ("PROTOCOL, Collusion", ["rule-?"]),
        ("ssl.PROTOCOL_TLS_CLIENT", []),
    ],
)
def test_what_counts_as_a_citation(text, rules):
    assert cited_rules(text) == rules


def test_no_text_cites_a_document_that_is_not_in_the_repository():
    outside = re.compile(r"\b(?:RE)?DESIGN\b|\bSTYLE\b|\bPROTOCOL\.md\b")
    sources = [path for path in files(".py", ".md", ".toml") if path != Path(__file__)]
    assert not [path for path in sources if outside.search(path.read_text())]


def test_tests_named_in_the_docs_exist():
    """The threat model says which test proves what; a renamed test must not leave a claim behind."""
    missing = []
    for path in files(".md"):
        for name in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", path.read_text()):
            place, _, function = name.partition("::")
            text = (ROOT / place).read_text() if (ROOT / place).is_file() else ""
            if not text or (function and f"def {function}(" not in text):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_there_are_as_many_tests_as_readme_says():
    """It gives no exact number, which the next commit would make wrong; functions are fewer than tests."""
    functions = sum(
        path.read_text().count("def test_") for path in (ROOT / "tests").rglob("test_*.py")
    )
    assert "Over a thousand tests" in (ROOT / "README.md").read_text()
    assert functions > 1000


def test_readme_is_short():
    """Prose and screens together, as `wc -w` counts them; what is longer belongs to a page in docs/."""
    assert len((ROOT / "README.md").read_text().split()) < 1200


@pytest.mark.parametrize("term", ["arm", "point", "exact", "site", "coordinator"])
def test_readme_defines_a_term_before_it_shows_a_result(term):
    terms, _, rest = (ROOT / "README.md").read_text().partition("## Terms")[2].partition("\n## ")
    assert f"**{term}**" in terms
    assert "points lost" in rest


def test_no_stray_absolute_paths():
    """Nothing may lean on one person's machine."""
    home = re.compile(r"(?<![\w.:/])/(?:home|Users|root|work|opt)/[\w.-]+")
    found = []
    for path in files(".py", ".md", ".toml", ".txt", ".cff", ".yaml", ".ipynb", ".json", ""):
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), start=1):
            if home.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found


def test_decisions_are_numbered_and_complete():
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    assert [name[:4] for name in names] == [f"{i:04d}" for i in range(1, len(names) + 1)]
    for name in names:
        text = (ROOT / "docs" / "decisions" / name).read_text()
        parts = ("## Context", "## Decision", "## Consequence", "## What would change our mind")
        assert all(part in text for part in parts), name


def fake_repository(folder: Path) -> Path:
    """A copy with the scripts and the files they hash, and nothing to install."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def fake_python(folder: Path, body: str) -> dict[str, str]:
    """An environment in which every python3 is this shell script."""
    folder.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}:/usr/bin:/bin", "PYTHON": ""}


@pytest.mark.parametrize(
    ("body", "says", "hint"),
    [
        (
            '[ "$1" = -V ] && echo "Python 3.9.2"; exit 1',
            "found Python 3.9.2, expected 3.11",
            "install one",
        ),
        (
            'case "$*" in *ensurepip*) exit 1;; *-V*) echo "Python 3.11.2";; esac',
            "found Python 3.11.2 without venv or pip",
            "python3-venv",
        ),
    ],
)
def test_set_up_says_what_is_missing(tmp_path, body, says, hint):
    root = fake_repository(tmp_path / "repo")
    env = fake_python(tmp_path / "bin", body)
    done = subprocess.run(
        ["bash", str(root / "scripts/demo")], env=env, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    error, remedy = done.stderr.splitlines()[-2:]
    assert error.startswith("error: ") and says in error
    assert remedy.startswith("hint: ") and hint in remedy
    assert done.stdout == ""
    assert not (root / ".venv").exists()


FAKE_VENV = r"""
case "$*" in
    *"-m venv"*)
        for last; do :; done
        echo venv >>"$LOG"
        mkdir -p "$last/bin"
        cp "$0" "$last/bin/python"
        printf '#!/bin/sh\necho "fedcore $*"\n' >"$last/bin/fedcore"
        chmod +x "$last/bin/fedcore"
        ;;
    *"-m pip"*) echo pip >>"$LOG"; sleep 1; [ -z "$BROKEN" ] || { echo "no such package"; exit 1; } ;;
    *-V*) echo "Python 3.11.2" ;;
esac
"""


def start(root: Path, env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(root / "scripts/demo"), "--seed", "3"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root.parent,
    )


@pytest.mark.parametrize("lock", ["flock", "mkdir"])
def test_set_up_happens_once_even_when_two_start(tmp_path, lock):
    root = fake_repository(tmp_path / "a repo")
    log = tmp_path / "log"
    env = fake_python(tmp_path / "bin", FAKE_VENV) | {"LOG": str(log), "BROKEN": ""}
    if lock == "mkdir":
        env |= without_flock(tmp_path / "bin")
    elif shutil.which("flock") is None:
        pytest.skip("no flock on this machine: the mkdir case is the one that counts here")
    both = [start(root, env), start(root, env)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [out for out, _ in outputs] == ["fedcore simulate --task heart --seed 3\n"] * 2
    assert log.read_text().split() == ["venv", "pip"]

    third = start(root, env)
    assert third.communicate(timeout=300)[1] == "", "a second run skips the set-up and says nothing"

    with (root / "constraints.txt").open("a") as file:
        file.write("# a new pin\n")
    start(root, env).communicate(timeout=300)
    assert log.read_text().split() == ["venv", "pip", "pip"], "new pins install into the same .venv"


def without_flock(folder: Path) -> dict[str, str]:
    """The path a machine without flock takes: a PATH of our own, without it."""
    tools = "bash cat cksum cp chmod dirname head ln mkdir rm sh sleep"
    for tool in tools.split():
        if not (folder / tool).exists():
            (folder / tool).symlink_to(str(shutil.which(tool)))
    return {"PATH": str(folder)}


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("finishes", [True, False], ids=["finished just now", "left behind"])
def test_a_lock_without_flock_whose_holder_has_ended(tmp_path, finishes):
    """The holder may finish after the waiter read its number: only a lock still there is stale."""
    root = fake_repository(tmp_path / "a repo")
    env = fake_python(tmp_path / "bin", FAKE_VENV) | {"LOG": str(tmp_path / "log"), "BROKEN": ""}
    lock = root / ".venv.lock.d"
    lock.mkdir()
    (lock / "pid").write_text(str(dead_process()))
    if finishes:  # `cat` gives the number, and then the holder is gone with its lock
        cat, rm = shutil.which("cat"), shutil.which("rm")
        script = (
            f'{cat} "$@"; code=$?\ncase "$*" in *.venv.lock.d/pid) {rm} -rf "${{1%/pid}}";; esac'
        )
        (tmp_path / "bin" / "cat").write_text(f"#!/bin/sh\n{script}\nexit $code\n")
        (tmp_path / "bin" / "cat").chmod(0o755)
    process = start(root, env | without_flock(tmp_path / "bin"))
    out, err = process.communicate(timeout=300)
    if finishes:
        assert process.returncode == 0, err
        assert out == "fedcore simulate --task heart --seed 3\n"
    else:
        assert process.returncode == 2 and out == ""
        assert "which has ended\nhint: rm -r " in err


def test_a_failed_set_up_says_why_and_starts_over(tmp_path):
    root = fake_repository(tmp_path / "repo")
    log = tmp_path / "log"
    env = fake_python(tmp_path / "bin", FAKE_VENV) | {"LOG": str(log), "BROKEN": "yes"}
    process = start(root, env)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "no such package" in err and "\nhint: " in err
    again = start(root, env | {"BROKEN": ""})
    again.communicate(timeout=300)
    assert again.returncode == 0
    assert log.read_text().split() == ["venv", "pip", "venv", "pip"]


def test_the_imports_of_scripts_exist():
    """Nothing else runs some of them in the suite."""
    for path in (ROOT / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedcore"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    found = hasattr(module, alias.name) or importlib.util.find_spec(
                        f"{node.module}.{alias.name}"
                    )
                    assert found, f"{path.name}: {node.module}.{alias.name}"
