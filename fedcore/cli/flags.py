"""The flags of the commands that take a job: each is spelt once, by the name of its setting.

A command names the settings that have a flag with a help text; every other key of a job file is a flag too
(`JobCommand`). Importing this module does not load pydantic or torch, so that `--help` stays fast: a test
compares the names and types below with the keys of a job.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.cli.console import JobCommand
from fedcore.errors import BadInput

FLAGS: dict[str, tuple[object, str]] = {
    "task": (
        str,
        "heart | digits | fashion | thyroid | loans | path/to/file.py[:attribute] | package.module:attribute",
    ),
    "protection": (str, "layered (default), masked, encrypted or plain."),
    "cipher": (str, "What encrypts under layered and encrypted: bfv or keystream."),
    "sum": (str, "full (default): the whole protocol; exact: the same sum without cryptography."),
    "executor": (str, "How sites are trained: sequential (default), batched, or auto, the faster."),
    "rounds": (int, "Rounds to run."),
    "cohort": (int, "Sites of each round, drawn by the seed; default: all."),
    "seed": (int, "Seed of model, split and training."),
    "bits": (int, "Quantised bits per coordinate."),
    "threshold": (int, "Sites a round needs at every stage; default: two thirds and one more."),
    "drop": (list[str], "Simulate an absence, round:stage:site, repeatable: --drop 3:submit:va"),
    "dropout": (float, "Chance that a site is absent from a round of training."),
    "validate": (float, "Share of the training rows kept apart to judge rounds by: 0.2"),
    "device": (str, "Where to train and evaluate: cpu (default), cuda or mps."),
    "initial": (str, "Begin with this released model: a run's folder, or a .safetensors file."),
    "set": (list[str], "section.key=value, repeatable: --set train.lr=0.05"),
}
"""{flag: (type, help)}; a list is given by repeating the flag."""

KEYS_HELP = (
    "Every key of a job file is a flag too: --lr 0.1, --batch-size 64, --server fedadam, "
    "--folds 10, --range 0.5 ... (docs/jobs.md lists them)."
)

JobFile = Annotated[
    Path | None,
    typer.Argument(help="A job file, a task's file, or a folder with job.toml or task.py in it."),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="A new directory; default: the next under runs/.")
]
FlowerApp = Annotated[
    Path | None,
    typer.Option(
        "--flower-app", metavar="DIR", help="Train this Flower app: a folder that `flwr run` takes."
    ),
]
RunConfig = Annotated[
    list[str] | None,
    typer.Option(
        "--run-config", "-c", help="Of --flower-app, as for `flwr run`: \"lr=0.1 name='a'\""
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace a former run in --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

# Of what is done with a model.
Model = Annotated[Path, typer.Argument(help="A run's folder, or the file of a released model.")]
ModelTask = Annotated[
    str, typer.Option("--task", help="The model's task, where its file does not name one.")
]

Settings = dict[str, Any]
"""One flat layer of a job's settings, with the values that were given."""

Command = Callable[..., None]


def job_command(app: typer.Typer, flags: str = "") -> Callable[[Command], Command]:
    """Register a function as a command with flags of a job, which it gets as `settings: Settings`.

    flags: names from FLAGS, and of the function's own parameters that stand between them, in the order
    of `--help`; `--set` comes last. They stand in the place of `settings`.
    """
    names = [*flags.split(), "set"]

    def register(function: Command) -> Command:
        own = dict(inspect.signature(function, eval_str=True).parameters)
        taken = [name for name in names if name not in own]
        shown = [own.pop(name) if name in own else _parameter(name) for name in names]
        place = list(own).index("settings")
        mine = list(own.values())
        parameters = [
            each.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for each in (*mine[:place], *shown, *mine[place + 1 :])
        ]

        @wraps(function)
        def command(**given: Any) -> None:
            settings = settings_of(given.pop("set"), {name: given.pop(name) for name in taken[:-1]})
            function(**given, settings=settings)

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return app.command(cls=JobCommand, epilog=KEYS_HELP)(command)

    return register


def _parameter(name: str) -> inspect.Parameter:
    kind, text = FLAGS[name]
    option = typer.Option(None, f"--{name}", help=text)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind)


_PAIR = re.compile(r"(\S+?)\s*=\s*('[^']*'|\"[^\"]*\"|\S+)\s*")


def of_flower_app(
    settings: Settings, app: Path | None, run_config: Sequence[str] | None
) -> Settings:
    """The settings with a Flower app as the task, and what `-c "k=v"` overrides of its run config. Raises BadInput."""
    from fedcore.config import parse_set
    from fedcore.learning.task_code import FLOWER

    if app is None:
        if run_config:
            raise BadInput(
                "-c: found a run config without --flower-app, expected both",
                remedy="`--set section.key=value` sets a key of the job",
            )
        return settings
    if "task" in settings:
        raise BadInput(
            f"--flower-app: found --task {settings['task']} beside it, expected one task"
        )
    text = " ".join(run_config or ()).strip()
    if _PAIR.sub("", text):
        raise BadInput(
            f"-c: found {text!r}, expected key=value pairs",
            remedy="-c \"num-server-rounds=5 name='a text'\"",
        )
    pairs = (parse_set(f"{key}={value}") for key, value in _PAIR.findall(text))
    own = {f"task.{key}": value for key, value in pairs}
    return {"task": f"{FLOWER}{app.resolve()}", **own, **settings}


def settings_of(set_: Sequence[str] | None, named: Settings) -> Settings:
    """The settings of `--set` and of the named flags that were given, which take precedence. Raises BadInput."""
    from fedcore.config import parse_set

    found = dict(parse_set(text) for text in set_ or [])
    if named.get("drop") is not None:
        named["drop"] = ",".join(named["drop"])  # each may hold several
    return found | {key: value for key, value in named.items() if value is not None}
