"""What the documentation site (mkdocs.yml) adds to the pages in docs/: the list of decisions, the help of all
commands, and links to files outside docs/ shown as the file's name."""

import re
from collections.abc import Iterator
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 78


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the decisions in the navigation, by their titles."""
    explanation = next(iter(config.nav[-1].values()))
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    decisions = [{_title(page): f"decisions/{page.name}"} for page in pages]
    explanation[:] = [each for each in explanation if "Decisions" not in each]
    explanation.append({"Decisions": decisions})
    return config


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Puts the help in its page, and names the file where a link leaves docs/."""
    if page.file.src_uri == "reference/commands.md":
        return markdown.replace("{commands}", "\n\n".join(_help()))
    here = (ROOT / "docs" / page.file.src_uri).parent

    def named(link: re.Match[str]) -> str:
        path = (here / link["target"].partition("#")[0]).resolve()
        on_site = path.is_relative_to(ROOT / "docs") and not path.is_dir()
        if on_site or re.match(r"[a-z]+:|#", link["target"]):
            return link[0]
        return f"{link['text']} (`{path.relative_to(ROOT)}`)"

    return re.sub(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", named, markdown)


def _title(page: Path) -> str:
    return page.read_text().partition("\n")[0].removeprefix("# ")


def _help() -> Iterator[str]:
    from fedcore_clients.cli import app as site
    from fedcore_server.cli import app as coordinator

    from fedcore.cli.console import command_of
    from fedcore.cli.main import app as fedcore

    for name, app in (("fedcore", fedcore), ("fed-coordinator", coordinator), ("fed-site", site)):
        yield from _sections(name, command_of(app), None)


def _sections(name: str, command: click.Command, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, **command.context_settings
    )
    level = "##" if parent is None else "###"
    yield f"{level} {context.command_path}\n\n```text\n{context.get_help()}\n```"
    for each, inner in sorted(getattr(command, "commands", {}).items()):
        if not inner.hidden:
            yield from _sections(each, inner, context)
