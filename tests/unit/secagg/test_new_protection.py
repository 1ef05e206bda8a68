"""Another protection is one entry of the registry, and its own way of protecting vectors one file: this one."""

from __future__ import annotations

from dataclasses import replace

import pytest

import fedcore
from fedcore.errors import PlanRefused
from fedcore.secagg.crypto.masking import add_masks
from fedcore.secagg.protections import PROTECTIONS, Protection, refuse_release, refuse_roster
from fedcore.secagg.scheme import EpochSecrets, Scheme

pytestmark = pytest.mark.usefixtures("no_drawings")


class PaddedSecrets(EpochSecrets):
    """A pad from the group secret below masks and keystream."""

    def pads(self, asked, sites, layout):
        return [self.stream(asked.header, b"pad", site, b"") for site in sites]

    def protect(self, slots, layout, asked, site, entropy):
        add_masks(slots, self.pads(asked, [site], layout), layout.packing.slot_bits)
        return super().protect(slots, layout, asked, site, entropy)

    def take_off_streams(self, total, layout, asked):
        super().take_off_streams(total, layout, asked)
        laid = [(key, -sign) for key, sign in self.pads(asked, asked.survivors, layout)]
        add_masks(total, laid, layout.packing.slot_bits)


class PaddedScheme(Scheme):
    def open_payload(self, payload, maker):
        found = super().open_payload(payload, maker)
        return PaddedSecrets(found.group, found.sealer, found.streams)


PADDED = Protection("padded", masks=True, encrypts=True, scheme=PaddedScheme)


@pytest.fixture(autouse=True)
def registered(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROTECTIONS, PADDED.name, PADDED)


def run(protection, **settings):
    return fedcore.simulate("heart", rounds=2, resamples=200, protection=protection, **settings)


def test_a_registered_protection_gives_the_same_model_as_plain():
    padded, plain = run("padded", cipher="keystream"), run("plain")
    assert padded.result["model_sha256"] == plain.result["model_sha256"]
    assert {gap["mean"] for gap in padded.result["gap"]["protection"].values()} == {0}


def test_its_own_scheme_protects_the_vectors(without):
    """Without the pads at the opening the tag of the sum does not hold."""
    without(PaddedSecrets, take_off_streams=EpochSecrets.take_off_streams)
    with pytest.raises(fedcore.FedcoreError, match="tag"):
        run("padded", cipher="keystream")


def test_rules_and_words_follow_from_what_it_does(monkeypatch):
    found = run("padded", cipher="keystream", drop=["1:submit:va"])
    label = found.result["label"]
    assert "the coordinator" in label.splitlines()[0] and "colluding site" in label
    report = (found.directory / "report.md").read_text()
    assert "masked and encrypted" in report and "pairwise and self masks" in report
    with pytest.raises(PlanRefused, match="'padded', expected at most 64"):
        refuse_roster(65, "padded")
    refuse_release("coordinator", "padded")
    monkeypatch.setitem(PROTECTIONS, "padded", replace(PADDED, masks=False))
    with pytest.raises(PlanRefused, match="found 'coordinator' under 'padded'"):
        refuse_release("coordinator", "padded")
