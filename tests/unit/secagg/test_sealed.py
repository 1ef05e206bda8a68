"""What is sealed under G opens for its holders, where it belongs, and for nobody else."""

from __future__ import annotations

import pytest

from fedcore.errors import EnvelopeRefused
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.sealed import (
    NOTICE_LENGTH,
    OVERHEAD,
    open_checkpoint,
    open_notice,
    seal_checkpoint,
    seal_notice,
)
from fedcore.secagg.crypto.sumtag import GroupSecret

STATE = b"parameters and moments" * 50
PLACE = {"job": "job", "round_": 7, "certificate": "ab" * 32}


@pytest.fixture
def group():
    return GroupSecret()


@pytest.fixture
def sealed(group):
    return seal_checkpoint(group, STATE, **PLACE, entropy=OsEntropy())


def test_it_opens_with_the_group_secret_where_it_belongs(group, sealed):
    assert open_checkpoint(group, sealed, **PLACE) == STATE
    assert len(sealed) == len(STATE) + OVERHEAD


@pytest.mark.parametrize(
    "other", [{"job": "jo"}, {"round_": 8}, {"certificate": "cd" * 32}, {"certificate": ""}]
)
def test_another_job_round_or_certificate_is_refused(group, sealed, other):
    with pytest.raises(EnvelopeRefused):
        open_checkpoint(group, sealed, **(PLACE | other))


def test_another_group_secret_is_refused(sealed):
    with pytest.raises(EnvelopeRefused):
        open_checkpoint(GroupSecret(), sealed, **PLACE)


@pytest.mark.parametrize("place", [0, 31, 32, -1])
def test_every_byte_counts(group, sealed, place):
    changed = bytearray(sealed)
    changed[place] ^= 1
    with pytest.raises(EnvelopeRefused):
        open_checkpoint(group, bytes(changed), **PLACE)


@pytest.mark.parametrize("length", [0, 31, 32, 47, -1])
def test_a_cut_checkpoint_is_refused(group, sealed, length):
    with pytest.raises(EnvelopeRefused):
        open_checkpoint(group, sealed[:length], **PLACE)


def test_two_seals_of_one_state_share_nothing(group, sealed):
    again = seal_checkpoint(group, STATE, **PLACE, entropy=OsEntropy())
    assert again[:32] != sealed[:32]
    assert again[32:] != sealed[32:]


def noticed(group, text, header=b"h" * 32, site="ann"):
    return seal_notice(group, text, header=header, site=site, entropy=OsEntropy())


@pytest.mark.parametrize(
    "text", ["", "sum: found another tag", "x" * 512, "x" * 10_000, "ü" * 300, "a" + "ü" * 300]
)
def test_every_notice_has_one_length_and_says_its_text(group, text):
    sealed = noticed(group, text)
    assert len(sealed) == NOTICE_LENGTH
    said = open_notice(group, sealed, header=b"h" * 32, site="ann")
    assert text.startswith(said) and len(said.encode()) >= min(len(text.encode()), 511)


@pytest.mark.parametrize("where", [{"header": b"g" * 32}, {"site": "bob"}])
def test_a_notice_of_another_round_or_site_is_refused(group, where):
    with pytest.raises(EnvelopeRefused):
        open_notice(group, noticed(group, "why"), **({"header": b"h" * 32, "site": "ann"} | where))


def test_a_notice_opens_with_the_group_secret_only_and_is_no_checkpoint(group):
    sealed = noticed(group, "why")
    with pytest.raises(EnvelopeRefused):
        open_notice(GroupSecret(), sealed, header=b"h" * 32, site="ann")
    with pytest.raises(EnvelopeRefused):
        open_checkpoint(group, sealed, **PLACE)
    assert noticed(group, "why") != sealed, "a key of its own each time"
