"""The rosters of a site: what it takes from its coordinator, what it shows, and what its operator approves."""

import json
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from fedcore_clients.check import _policy, _roster, rosters_text
from fedcore_clients.cli import main
from fedcore_clients.config import read_config
from fedcore_clients.rosters import (
    APPROVED_FILE,
    NEWEST_FILE,
    ROSTERS_FOLDER,
    approve_roster,
    approved_roster,
    newest_roster,
    roster_json,
    roster_lines,
)

from fedcore.errors import BadInput, Refused, SignatureRefused
from fedcore.identity.identities import write_roster
from fedcore.identity.kit import Kit
from fedcore.identity.signed_roster import SignedRoster, kept_pins
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.wire.frames import JobRoster
from tests.support.rosters import AUTHORITY, KEYS, OTHER, SiteFolder, document


@pytest.fixture
def site(tmp_path):
    return SiteFolder(tmp_path)


def offer(name):
    return JobOffer(name, "t", "0" * 64, b"{}")


def named(site, job, number, names, **keys):
    """The coordinator names the roster of a job, then offers it."""
    digest = SignedRoster.parse(document(number, names, **keys)).digest
    site.rosters.name(JobRoster(job, number, digest))
    return site.rosters.word_on(offer(job))


def test_a_new_roster_waits_until_the_operator_approves_it(site):
    assert site.take(2, "abcd") == "waiting" and site.sites == "abc"
    assert approve_roster(site.config, site.kit, 2)["waiting"]["changes"] == ["1 site added: d"]
    assert site.rosters.refresh() and site.sites == "abcd"
    assert not site.rosters.refresh(), "once"
    assert site.policy.sites == 4, "the policy counts the sites of the roster in force"
    assert site.take(2, "abcd") == "approved"


def test_rosters_that_were_seen_are_kept(site):
    """What a site signed can be verified after it has left."""
    site.take(2, "abcd")
    site.take(3, "abc")
    site.take(2, "abcd")
    folder = site.config.folder / ROSTERS_FOLDER
    assert sorted(path.name for path in folder.iterdir()) == ["1.toml", "2.toml", "3.toml"]
    pins = kept_pins(folder, site.kit.authority_pem, site.kit.peer.federation, {})
    assert [pin.site for pin in pins] == ["a", "b", "c", "d"]
    assert [bool(pin.until) for pin in pins] == [False, False, False, True]


def test_a_policy_that_takes_any_roster_needs_no_approval(tmp_path):
    site = SiteFolder(tmp_path, roster="any")
    assert site.take(2, "abcd") == "approved" and site.sites == "abcd"


def test_a_policy_that_becomes_any_takes_the_roster_that_waits(site):
    site.take(2, "abcd")
    assert not site.rosters.refresh()
    site.policy.rules = site.policy.rules.model_copy(update={"roster": "any"})
    assert site.rosters.refresh() and site.sites == "abcd"


def test_what_was_seen_and_approved_outlives_the_process(site):
    site.take(2, "abcd")
    site.start()
    assert site.sites == "abc" and site.rosters.waits
    approve_roster(site.config, site.kit, 2)
    site.start()
    assert site.sites == "abcd" and not site.rosters.waits


def test_the_operator_may_place_a_newer_roster_by_hand(site):
    site.config.roster.write_bytes(document(3, "abcde"))
    assert site.rosters.refresh() and site.sites == "abcde"
    assert site.take(2, "abc") == "older"


def test_a_static_roster_is_read_again_where_the_operator_replaces_it(tmp_path):
    site = SiteFolder(tmp_path)
    write_roster(site.config.roster, {name: KEYS[name] for name in "abc"})
    site.start()
    assert site.live.current.number == 0
    write_roster(site.config.roster, {name: KEYS[name] for name in "abcd"})
    assert site.rosters.refresh() and site.sites == "abcd"


def test_a_broken_file_leaves_the_roster_in_force(site):
    site.config.roster.write_text("[sites")
    assert not site.rosters.refresh() and site.sites == "abc"
    assert "TOML" in site.rosters.problem
    assert "TOML" in "\n".join(roster_lines(site.rosters.to_json()))


def test_the_changes_are_shown_in_words_with_the_command_that_approves(site):
    site.take(4, "abde", b=KEYS["z"])
    assert roster_lines(site.rosters.to_json()) == [
        "roster 1: 3 sites: a, b, c",
        "roster 4 waits for approval: fed-site roster approve 4",
        "  2 sites added: d, e",
        "  1 site removed: c",
        "  1 site with another identity key: b",
        "  then 3 of 4 sites are needed in every round, by default",
    ]
    current = site.live.current
    shown = roster_json(current, newest_roster(site.config, site.kit, current))
    assert json.loads(json.dumps(shown))["waiting"]["number"] == 4, "the command shows the same"


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [(3, BadInput, "expected 2"), (1, BadInput, "expected 2"), (-2, BadInput, "expected 2")],
)
def test_another_number_than_the_one_that_waits_is_not_approved(site, number, error, text):
    site.take(2, "abcd")
    with pytest.raises(error, match=text):
        approve_roster(site.config, site.kit, number)
    assert not (site.config.folder / APPROVED_FILE).exists()


def test_nothing_to_approve_says_so(site):
    with pytest.raises(Refused, match="none that waits"):
        approve_roster(site.config, site.kit, 1)


def test_a_file_that_was_altered_is_not_approved(site):
    site.take(2, "abcd")
    path = site.config.folder / NEWEST_FILE
    path.write_bytes(path.read_bytes().replace(KEYS["d"].hex().encode(), KEYS["z"].hex().encode()))
    with pytest.raises(SignatureRefused):
        approve_roster(site.config, site.kit, 2)
    with pytest.raises(SignatureRefused):
        site.start()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"[sites]\n", "signature"), (b"\xff", "malformed"), (b"number = 2\n[signature]\n", "malformed"),
        (document(2, "abcd", OTHER), "signature"),
        (document(2, "abcd").replace(b"number = 2", b"number = 3"), "signature"),
        (document(2, "abcd").replace(b'federation = "town"', b'federation = "city"'), "signature"),
    ],
)  # fmt: skip
def test_what_the_authority_did_not_sign_is_refused_and_recorded(site, data, word):
    assert site.rosters.take(data).word == word
    assert site.sites == "abc" and not (site.config.folder / NEWEST_FILE).exists()
    assert site.trail.events == [("refused", {"what": "roster", "why": word})]
    assert site.rosters.problem
    assert site.take(1, "abc") == "approved" and not site.rosters.problem


# --------------------------------------------------------------------------------- offers of jobs


def test_a_job_of_the_roster_in_force_is_taken(site):
    assert named(site, "j", 1, "abc") == "approved"
    assert site.rosters.word_on(offer("unnamed")) == "approved", "a static federation"


def test_a_job_of_a_roster_that_waits_is_held_until_it_is_approved(site):
    site.take(2, "abcd")
    assert named(site, "j", 2, "abcd") == "waiting"
    assert not site.rosters.released()
    approve_roster(site.config, site.kit, 2)
    site.rosters.refresh()
    assert [each.job for each in site.rosters.released()] == ["j"]
    assert not site.rosters.held


def test_a_job_of_another_roster_is_refused(site):
    assert named(site, "unseen", 2, "abcd") == "unknown"
    site.take(2, "abcd")
    assert named(site, "altered", 2, "abce") == "unknown"
    approve_roster(site.config, site.kit, 2)
    site.rosters.refresh()
    assert named(site, "before", 1, "abc") == "older"
    assert {facts["job"] for event, facts in site.trail.events if facts["what"] == "job"} == {
        "unseen", "altered", "before",
    }  # fmt: skip


def test_only_so_many_offers_are_held(site):
    site.take(2, "abcd")
    for number in range(200):
        named(site, f"j{number}", 2, "abcd")
    assert len(site.rosters.held) == 64


# ------------------------------------------------------------------------------------- commands


@pytest.fixture
def home(tmp_path):
    """A site's folder with its kit and site.toml; roster 2 waits there."""
    site = SiteFolder(tmp_path)
    AUTHORITY.issue("site", "a", datetime.now(UTC)).save(tmp_path / "kit")
    (tmp_path / "site.toml").write_text(
        'site = "a"\ncoordinator = "127.0.0.1:1"\nkit = "kit"\nidentity = "identity.pem"\n'
        'roster = "roster.toml"\nfolder = "state"\n'
    )
    site.take(2, "abcd")
    return tmp_path


def ran(capsys, home, *words):
    """Exit code, stdout and stderr of `fed-site roster ...`."""
    with pytest.raises(SystemExit) as ended:
        main(["roster", *words, "--config", str(home / "site.toml")])
    return ended.value.code, *capsys.readouterr()


def test_the_commands_show_and_approve(capsys, home):
    code, out, _ = ran(capsys, home)
    assert code == 0 and "roster 2 waits for approval: fed-site roster approve 2\n" in out
    code, out, _ = ran(capsys, home, "approve", "2")
    assert code == 0 and out == "roster 2 approved: 4 sites\n1 site added: d\n"
    code, out, _ = ran(capsys, home)
    assert code == 0 and out == "roster 2: 4 sites: a, b, c, d\n"


def test_a_wrong_number_is_bad_input_and_nothing_to_approve_is_refused(capsys, home):
    code, out, err = ran(capsys, home, "approve", "7")
    assert code == 2 and not out and "found number 7, expected 2" in err and "hint:" in err
    ran(capsys, home, "approve", "2")
    code, out, err = ran(capsys, home, "approve", "2")
    assert code == 3 and not out and "none that waits" in err and "hint:" in err


def test_check_shows_the_roster_and_warns_of_one_that_waits(home):
    config = read_config(home / "site.toml")
    kit = Kit.load(config.kit)
    papers = SimpleNamespace(kit=kit, roster=approved_roster(config, kit))
    said = _roster(config, papers)
    assert said.startswith("number 1, signed by the federation's authority: 3 sites; warning: ")
    assert said.endswith("number 2 waits for `fed-site roster approve`: 1 site added: d")
    approve_roster(config, kit, 2)
    papers.roster = approved_roster(config, kit)
    assert _roster(config, papers) == "number 2, signed by the federation's authority: 4 sites"


@pytest.mark.parametrize(
    ("numbers", "approves", "text"),
    [
        ((4, 4, 4), True, "roster 4 at both ends"),
        ((2, 2, 5), False, "roster 5 at the coordinator: `fed-site run` takes it"),
        ((2, 2, 5), True, "warning: roster 5 waits: `fed-site run` fetches it, then `fed-site roster approve 5`"),
        ((2, 5, 5), True, "warning: roster 5 waits: `fed-site roster approve 5`"),
        ((2, 4, 5), True, "warning: roster 5 waits: `fed-site run` fetches it, then `fed-site roster approve 5`"),
        ((4, 4, 3), True, "warning: roster 3 at the coordinator is older than 4, which this site has seen, and is"
         " refused: ask the federation's operator"),
    ],
)  # fmt: skip
def test_check_compares_the_roster_with_the_coordinators(numbers, approves, text):
    assert rosters_text(*numbers, approves=approves) == text


def test_check_of_the_first_site_that_joined_warns_of_too_few(tmp_path):
    site = SiteFolder(tmp_path, document(1, "a"))
    said = _policy(site.policy)
    assert "because of minimum_sites: too few sites so far on the roster here, 1" in said
    said = _roster(site.config, SimpleNamespace(kit=site.kit, roster=site.live.current))
    assert said == "number 1, signed by the federation's authority: 1 site"


def test_a_site_that_has_not_run_yet_says_so(capsys, home):
    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main([*words, "--config", str(home / "site.toml")])
        return ended.value.code, *capsys.readouterr()

    code, out, _ = run("jobs")
    assert code == 0 and out.startswith("no jobs yet: a running site")
    assert json.loads(run("jobs", "--json")[1]) == {"jobs": []}
    code, out, err = run("status")
    assert (code, out) == (2, "") and "this site has not run yet" in err and "fed-site run" in err
    code, _, err = run("approve", "heart-1")
    assert code == 2 and "no job at this site yet" in err
