"""The page in headless Chromium: it fits a phone, asks nobody for anything, and says its headline."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.results import result_of, stored, stored_rounds

from fedcore.report import grid_page, page
from fedcore.results import GridResult, Result, RoundRow

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium on this machine (Debian: apt install chromium)"
)

PHONE = 360
GRID = Path(__file__).parents[2] / "docs" / "benchmarks" / "heart.json"
SETS = [["heart"], ["heart_warned"], ["heart", "heart_warned"], ["heart_compare"]]


def load(name: str) -> tuple[Result, list[RoundRow]]:
    return result_of(stored(name)), stored_rounds(name)


def dump(url: str, profile: Path, *options: str) -> str:
    """The DOM of the page at `url` after it has loaded, as the browser writes it out."""
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        # The browser's own services find nobody, and neither would a page's request.
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}", *options, "--dump-dom", url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout


def requests_of_the_page(log: Path) -> set[str]:
    """URLs that a document asked for; the browser's own have `not an origin` as their initiator."""
    text = log.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except json.JSONDecodeError:  # the log's end is missing if the browser leaves in a hurry
        found = json.loads(text.rstrip().rstrip(",") + "]}")
    start = found["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    events = [e.get("params", {}) for e in found["events"] if e["type"] == start]
    return {e["url"] for e in events if "url" in e and e.get("initiator") != "not an origin"}


def overflow(text: str, width: int, tmp_path: Path) -> tuple[int, int, str]:
    """(content width, window width, offending elements) of the page in a frame `width` px wide.

    A frame, because a browser window does not get as narrow as a phone.
    """
    frame = (
        f'<!doctype html><iframe id="f" style="width:{width}px;height:800px;border:0" '
        f'srcdoc="{html.escape(text)}"></iframe><p id="out"></p><script>'
        "const f = document.getElementById('f');"
        "f.onload = () => { const d = f.contentDocument, w = d.documentElement.clientWidth;"
        "const wide = [...d.querySelectorAll('main *')].filter(e => !e.closest('svg'))"
        ".filter(e => e.getBoundingClientRect().right > w + 0.5 || e.scrollWidth > e.clientWidth + 1"
        " && getComputedStyle(e).overflowX === 'auto').map(e => e.tagName + '.' + e.className);"
        "document.getElementById('out').textContent ="
        "`[[${d.documentElement.scrollWidth} ${w} ${wide.join(' ')}]]`; };</script>"
    )
    path = tmp_path / "frame.html"
    path.write_text(frame, encoding="utf-8")
    found = re.search(r"\[\[(\d+) (\d+) (.*?)\]\]", dump(path.as_uri(), tmp_path / "profile"))
    assert found, "the frame did not load"
    return int(found[1]), int(found[2]), found[3]


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_nothing_scrolls_sideways_on_a_phone(names, tmp_path):
    content, window, offenders = overflow(page.render([load(n) for n in names]), PHONE, tmp_path)
    assert window == PHONE or window == PHONE - 15  # with or without a scroll bar
    assert content <= window
    assert offenders == ""


def test_a_grid_of_comparisons_does_not_scroll_sideways_on_a_phone(tmp_path):
    text = grid_page.render(GridResult.from_json(json.loads(GRID.read_text())), [])
    content, window, offenders = overflow(text, PHONE, tmp_path)
    assert content <= window
    assert offenders == ""


def test_a_long_name_without_spaces_does_not_widen_the_page(tmp_path):
    found, rounds = load("heart")
    result = found.to_json()
    name = "hospital" * 20
    result["per_site"] = {name: result["per_site"].pop("cleveland"), **result["per_site"]}
    result["task"] = result["reproduce"] = name
    content, window, _ = overflow(page.render([(result_of(result), rounds)]), PHONE, tmp_path)
    assert content <= window


@pytest.mark.parametrize(
    ("clicks", "order"),
    [
        ([4], ["va", "switzerland", "cleveland", "hungary"]),
        ([4, 4], ["hungary", "cleveland", "switzerland", "va"]),
        ([4, 0], ["cleveland", "hungary", "switzerland", "va"]),
    ],
)
def test_the_table_of_sites_is_sorted_by_the_column_that_is_clicked(clicks, order, tmp_path):
    found = stored("heart")
    for site, gain in {
        "hungary": -0.03,
        "cleveland": -0.01,
        "switzerland": 0.02,
        "va": 0.1,
    }.items():
        found["per_site"][site]["local_only"]["auc"] = 0.5
        found["per_site"][site]["federated"]["auc"] = 0.5 + gain
    text = page.render([(result_of(found), stored_rounds("heart"))])
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text
    )  # it stops the click
    click = "".join(f"document.querySelector('[data-column=\"{c}\"]').click();" for c in clicks)
    (tmp_path / "page.html").write_text(text.replace("</body>", f"<script>{click}</script></body>"))
    dom = dump((tmp_path / "page.html").as_uri(), tmp_path / "profile")
    body = dom[dom.index('class="aligned') :]
    rows = re.findall(r'<th scope="row">([^<]*)</th>', body[: body.index("</table>")])
    assert rows == [*order, "site mean"]


@pytest.mark.parametrize("names", [["heart"], ["heart_compare"]], ids="+".join)
def test_the_page_asks_for_nothing_and_says_its_headline(names, tmp_path):
    text = page.render([load(n) for n in names])
    # Without its own policy, so that the test sees requests which the policy would have stopped.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    log = tmp_path / "net.json"
    dom = dump((tmp_path / "report.html").as_uri(), tmp_path / "profile", f"--log-net-log={log}")
    assert requests_of_the_page(log) == set()
    headline = {"heart": "points of AUC lost on these rows", "heart_compare": "No loss measurable"}
    assert headline[names[0]] in dom
    assert dom.count("<svg") >= 2


def test_a_request_would_have_been_seen(tmp_path):
    """The instrument above works: a page with an outside image is caught, our policy stops it."""
    image = '<img src="https://example.org/x.png">'
    (tmp_path / "leak.html").write_text(f"<!doctype html>{image}", encoding="utf-8")
    log = tmp_path / "leak.json"
    dump((tmp_path / "leak.html").as_uri(), tmp_path / "a", f"--log-net-log={log}")
    assert requests_of_the_page(log) == {"https://example.org/x.png"}
    policed = page.render([load("heart")]).replace("</main>", f"{image}</main>")
    (tmp_path / "policed.html").write_text(policed, encoding="utf-8")
    log = tmp_path / "policed.json"
    dump((tmp_path / "policed.html").as_uri(), tmp_path / "b", f"--log-net-log={log}")
    assert requests_of_the_page(log) == set()
