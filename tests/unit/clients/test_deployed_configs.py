"""federation.toml, site.toml and operator.toml: paths, defaults, and what is said of a wrong one."""

from __future__ import annotations

import pytest
from fedcore_clients import config as site
from fedcore_clients.check import _folder, clock_text, version_text
from fedcore_clients.config import JOURNAL_FILE
from fedcore_clients.sandbox import hidden
from fedcore_server import config as hub
from support.deployed_jobs import SITE_TOML
from support.keystores import new_site

from fedcore.errors import BadInput, Refused, UnknownName
from fedcore.identity.addresses import endpoint
from fedcore.identity.proxies import Proxy, ProxySection
from fedcore.store.journal import Journal
from fedcore.wire.frames import SOFTWARE, Welcome

FEDERATION = 'name = "heart"\nroster = "r.toml"\nkit = "kit"\nfolder = "state"\n'


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(hub.OPERATOR_VARIABLE, raising=False)

    def write(name, text):
        path = tmp_path / "etc" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_paths_count_from_the_file(written):
    path = written("site.toml", SITE_TOML)
    (path.parent / "data").mkdir()
    (path.parent / "data" / "va.csv").write_text("x")
    found = site.read_config(path)
    assert found.kit == path.parent / "kit" and found.identity == path.parent / "keys/identity.pem"
    assert str(found.roster) == "/etc/fedcore/roster.toml"
    assert found.tasks["heart"].source == str(path.parent / "data/va.csv")
    assert (found.host, found.port, found.through) == ("hub.example.org", 7443, None)
    federation = hub.read_config(written("federation.toml", FEDERATION))
    assert federation.roster == path.parent / "r.toml" and federation.metrics_port is None


def test_a_source_that_is_no_path_stays_what_it_is(written):
    for source in ('"va"', "7", '{ table = "rows" }', '"data/none.csv"'):
        text = SITE_TOML.replace('"data/va.csv"', source)
        found = site.read_config(written("site.toml", text)).tasks["heart"].source
        assert found in ("va", 7, {"table": "rows"}, "data/none.csv")


def test_flower_app_stands_in_the_place_of_a_task(written):
    text = SITE_TOML.replace('task = "heart"', 'flower_app = "apps/cough"')
    path = written(
        "site.toml", text.replace('"data/va.csv"', "{partition-id = 1, num-partitions = 4}")
    )
    (path.parent / "apps" / "cough").mkdir(parents=True)
    found = site.read_config(path).tasks["heart"]
    assert found.task == f"flower:{path.parent}/apps/cough"
    assert found.source == {"partition-id": 1, "num-partitions": 4}
    hiding = path.read_text().replace('"state"', '"apps"')
    with pytest.raises(
        BadInput, match="apps/cough inside it"
    ):  # an app in a folder that a sandbox hides
        hidden(site.read_config(written("other.toml", hiding)))


@pytest.mark.parametrize(
    ("old", "new", "error", "parts"),
    [
        ('site = "va"\n', "", BadInput, ("site.toml: site", "found nothing")),
        ("identity =", "identiy =", UnknownName, ("identiy", "'identity'")),
        ("sha256 =", "sha =", UnknownName, ("tasks.heart.sha", "tasks.heart.sha256")),
        ("0" * 64, "0" * 63, BadInput, ("tasks.heart.sha256",)),
        ('task = "heart"', "", BadInput, ("tasks.heart", "neither task nor flower_app")),
        (
            'task = "heart"', 'task = "heart"\nflower_app = "app"', BadInput,
            ("tasks.heart", "task and flower_app"),
        ),
        (":7443", "", BadInput, ("coordinator", "host:port")),
        (":7443", ":99999", BadInput, ("port 99999",)),
        ('folder = "state"', "folder = 3", BadInput, ("folder: found 3",)),
        ('site = "va"', 'base = "/"\nsite = "va"', UnknownName, ("base",)),
        ('"va"\n', '"va\n', BadInput, ("it cannot be read as TOML",)),
    ],
)  # fmt: skip
def test_a_wrong_site_file(written, old, new, error, parts):
    path = written("site.toml", SITE_TOML.replace(old, new, 1))
    with pytest.raises(error) as caught:
        site.read_config(path)
    for part in parts:
        assert part in f"{caught.value} {caught.value.remedy}"


@pytest.mark.parametrize(
    ("text", "found"),
    [("h:1", ("h", 1)), ("[::1]:7443", ("::1", 7443)), ("127.0.0.1:80", ("127.0.0.1", 80))],
)
def test_an_endpoint(text, found):
    assert endpoint(text) == found


@pytest.mark.parametrize("text", ["", "h", "h:", ":1", "::1:7443", "h:x", "h:0", "[h:1", "h h:1"])
def test_what_is_no_endpoint(text):
    with pytest.raises(BadInput, match="coordinator"):
        endpoint(text)


def test_where_an_operator_s_calls_go(written, monkeypatch, tmp_path):
    with pytest.raises(BadInput, match="--coordinator") as caught:
        hub.find_place(None, None, None)
    assert hub.OPERATOR_VARIABLE in caught.value.remedy
    with pytest.raises(BadInput, match="--kit"):
        hub.find_place("h:1", None, None)
    path = written("op.toml", 'coordinator = "hub:7443"\nkit = "mine"\nproxy = "http://p:3128"\n')
    named = hub.find_place(None, None, path)
    assert named == hub.OperatorConfig(
        coordinator="hub:7443", kit=path.parent / "mine", proxy=ProxySection(url="http://p:3128")
    )
    assert (named.host, named.port, named.through) == ("hub", 7443, Proxy.parse("http://p:3128"))
    assert hub.find_place("other:1", None, path).host == "other"
    monkeypatch.setenv(hub.OPERATOR_VARIABLE, str(path))
    assert hub.find_place(None, None, None) == named
    monkeypatch.delenv(hub.OPERATOR_VARIABLE)
    (tmp_path / "operator.toml").write_text('coordinator = "here:1"\nkit = "k"\n')
    assert hub.find_place(None, None, None) == hub.OperatorConfig(
        coordinator="here:1", kit=tmp_path / "k"
    )


def test_clocks_and_versions_at_both_ends():
    now = 1_800_000_000.0
    assert clock_text(Welcome("heart", int(now * 1000)), now + 2) == "2.0 s from the coordinator's"
    with pytest.raises(Refused, match="2 h ahead of the coordinator's"):
        clock_text(Welcome("heart", int(now * 1000)), now + 7200)
    with pytest.raises(Refused, match="5 min behind") as caught:
        clock_text(Welcome("heart", int(now * 1000)), now - 300)
    assert "NTP" in caught.value.remedy
    assert version_text(SOFTWARE) == f"{SOFTWARE} at both ends"
    with pytest.raises(Refused, match="fedcore 9 at the coordinator"):
        version_text("fedcore 9")


def test_a_journal_that_the_site_opened_just_now_is_not_a_failure(tmp_path):
    """It has no status yet, which it writes a little later."""
    config = new_site(tmp_path / "va").model_copy(update={"keystore": None})
    with Journal.open(config.folder / JOURNAL_FILE, party=config.party):
        assert "its process runs" in _folder(config)
    assert "0 records" in _folder(config)
