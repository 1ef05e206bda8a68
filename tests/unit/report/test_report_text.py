"""Markdown and LaTeX: the tables, the sentences, and every special character made literal."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.results import result_of, stored

from fedcore.report import latex, markdown, phrases
from fedcore.report import sentences as say
from fedcore.results import Result

NAMES = ["heart", "heart_warned", "heart_compare"]
HOSTILE = (
    "<script>",
    "[red]",
    "a_b%",
    "x|y",
    "\\input{/etc/passwd}",
    "`rm`",
    "#1 & $2 ~ ^3",
    "*b*",
)


def load(name: str) -> Result:
    return result_of(stored(name))


def hostile(name: str) -> Result:
    result = stored("heart")
    result["task"] = result["label"] = result["reproduce"] = name
    result["sites"][0] = name
    result["per_site"] = {name: result["per_site"].pop("cleveland"), **result["per_site"]}
    result["warnings"] = [name]
    result["seen"]["site"] = result["seen"]["other"] = name
    return result_of(result)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_tables_are_rectangular_and_warnings_come_first(name):
    result = load(name)
    text = markdown.render(result)
    block: list[int] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            block.append(len(re.findall(r"(?<!\\)\|", line)))
        else:
            assert len(set(block)) <= 1
            block = []
    assert text.index("**Warning:**") < text.index(f"**{say.lost(result)[0][:12]}")
    assert "## Methods" in text and result.origin.reproduce in text


def test_markdown_holds_the_numbers():
    text = markdown.render(load("heart"))
    assert "| federated, encrypted | 0.883 | 0.51 (-0.23 to 1.38) | 0.800 |" in text
    assert "| protection | 0 (exact) | 0 (exact) |" in text
    assert "| switzerland | 25 | – | – | – (one class) |" in markdown.render(load("heart_warned"))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_literal_in_markdown(name):
    text = markdown.render(hostile(name))
    outside_code = re.sub(r"(`+).+?\1", "", text.replace("\\`", ""))
    assert "<script>" not in outside_code
    # What is left unescaped is ours: bold sentences and the bars of tables.
    assert not re.search(r"(?<!\\)[\[\]*]", outside_code.replace("**", ""))
    assert markdown.code("a`b``c") == "``` a`b``c ```"


@pytest.mark.parametrize("name", NAMES)
def test_latex_is_balanced_and_uses_booktabs(name):
    text = latex.render(load(name))
    assert text.count("\\begin{") == text.count("\\end{")
    assert text.count("\\toprule") == text.count("\\bottomrule") >= 4
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert all(len(re.findall(r"(?<!\\)&", row)) >= 2 for row in rows)
    assert not re.search(r"(?<!\\)[%#_](?! )", text.partition("\n")[2].replace("\n%", "\n"))
    assert "\\paragraph{Methods.}" in text


@given(st.text())
def test_latex_escaping_leaves_no_active_character(text: str):
    escaped = latex.escape(text)
    words = r"\\text(?:backslash|asciitilde|asciicircum|asciigrave|less|greater|bar|quotedbl)\{\}"
    rest = re.sub(words, "", escaped)
    rest = re.sub(r"\\[&%$#_{}]|\{[*\[\]]\}", "", rest)
    assert not re.search(r'[\\~^<>|&%$#_{}"`*\[\]]', rest)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_literal_in_latex(name):
    text = latex.render(hostile(name))
    assert "\\input{" not in text and "<script>" not in text
    assert latex.escape(phrases.plain(name)) in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on this machine")
@pytest.mark.parametrize("name", HOSTILE)
def test_latex_compiles(name, tmp_path):
    body = latex.render(hostile(name))
    document = "\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{textcomp,booktabs}"
    (tmp_path / "t.tex").write_text(f"{document}\\begin{{document}}\n{body}\\end{{document}}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-800:]
