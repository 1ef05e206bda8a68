"""`--help` of every command of the three programs: all in it has a text, and lists of commands are not cut off."""

import re
from typing import Annotated

import click
import pytest
import typer
from fedcore_clients.cli import app as site
from fedcore_server.cli import app as coordinator

from fedcore.cli.console import application, command_of
from fedcore.cli.main import app as fedcore

PROGRAMS = {"fedcore": fedcore, "fed-coordinator": coordinator, "fed-site": site}


def contexts(command, name, parent=None):
    """Of a command and of all below it."""
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=80, **command.context_settings
    )
    yield context
    for inner, each in getattr(command, "commands", {}).items():
        yield from contexts(each, inner, context)


ALL = {
    context.command_path: context
    for name, app in PROGRAMS.items()
    for context in contexts(command_of(app), name)
}
every_command = pytest.mark.parametrize("context", ALL.values(), ids=ALL)


def words(text):
    return " ".join(text.split())


@every_command
def test_every_argument_and_option_is_shown_once_with_its_text(context):
    shown = words(context.get_help())
    arguments = [each for each in context.command.params if isinstance(each, click.Argument)]
    assert len(re.findall(r"(?i)\barguments: ", shown)) == bool(arguments)
    for parameter in context.command.get_params(context):
        name, text = parameter.get_help_record(context)
        assert re.search("[a-z]{3}", parameter.help or ""), f"{name}: no help text"
        assert shown.count(words(f"{name} {text}")) == 1


@every_command
def test_every_command_says_what_it_does(context):
    text = words(context.command.help or "")
    assert re.fullmatch(r"[A-Z].*[.]", text)
    assert text in words(context.get_help())


@pytest.mark.parametrize("path", [p for p, c in ALL.items() if hasattr(c.command, "commands")])
def test_a_list_of_commands_has_whole_sentences(path):
    listed = ALL[path].get_help().partition("Commands:\n")[2].splitlines()
    assert len(listed) == len(ALL[path].command.commands)
    for line in listed:
        assert re.fullmatch(r"  [a-z]+ +[A-Z].*[^.][.]", line)


def test_an_argument_keeps_its_text_default_and_whether_it_is_needed():
    app = application("tried", "A program.")

    @app.command()
    def two():
        """Do another thing."""

    @app.command()
    def one(
        needed: Annotated[str, typer.Argument(help="What is needed.")],
        other: Annotated[str, typer.Argument(help="What else.")] = "here",
        silent: Annotated[str, typer.Argument()] = "quiet",
    ):
        """Do one thing."""

    shown = words(click.Context(command_of(app).commands["one"], info_name="one").get_help())
    assert "Arguments: NEEDED What is needed. [required] " in shown
    assert "[OTHER] What else. [default: here] [SILENT] [default: quiet] Options: " in shown
    assert "Positional" not in shown
