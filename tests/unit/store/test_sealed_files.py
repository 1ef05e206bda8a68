"""Sealed files: they open whole and in their own place, or not at all."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import StoreProblem
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.store import sealed_files
from fedcore.store.sealed_files import FORM, FileSealer, is_sealed_file

KEY = SecretBytes(bytes(range(32)))
PLACE = ("state", "job-1", "current")
HEAD = len(FORM) + sealed_files.SALT_BYTES


@pytest.fixture
def sealer():
    return FileSealer(KEY)


def written(path, sealer, content, *place):
    path.write_bytes(b"".join(sealer.seal((content,), *(place or PLACE))))
    return path


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    monkeypatch.setattr(sealed_files, "PIECE", 16)


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 32, 33, 160])
def test_content_of_any_length_comes_back(tmp_path, sealer, size):
    content = bytes(range(size))
    path = written(tmp_path / "f", sealer, content)
    assert sealer.open(path, *PLACE) == content
    assert is_sealed_file(path) and not (size > 3 and content in path.read_bytes())
    boxes = max(1, -(-size // 16))
    assert path.stat().st_size == HEAD + size + 16 * boxes


def test_the_same_content_is_never_sealed_the_same_way(tmp_path, sealer):
    """A key that seals two contents would give their difference away."""
    files = [b"".join(sealer.seal((bytes(64),), *PLACE)) for _ in range(20)]
    boxes = [file[at : at + 16] for file in files for at in range(HEAD, len(file), 32)]
    assert len(set(boxes)) == len(boxes) == 80


@pytest.mark.parametrize(
    "place",
    [
        ("state", "job-2", "current"),
        ("state", "job-1", "candidate"),
        ("app", "job-1", "current"),
        ("state", "job-1current", ""),
        ("state", "job-1"),
        (),
    ],
)
def test_a_file_opens_in_its_own_place_only(tmp_path, sealer, place):
    path = written(tmp_path / "f", sealer, b"content")
    with pytest.raises(StoreProblem, match="f: found a content that was not encrypted for this"):
        sealer.open(path, *place)
    with pytest.raises(StoreProblem, match="not encrypted for this place"):
        FileSealer(SecretBytes(bytes(32))).open(path, *PLACE)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_change_is_refused(tmp_path_factory, data):
    """Bytes changed, cut off, appended, repeated; boxes left out or put in another order."""
    sealer = FileSealer(KEY)
    size = data.draw(st.integers(0, 80))
    whole = b"".join(sealer.seal((bytes(size),), *PLACE))
    head, body = whole[:HEAD], whole[HEAD:]
    boxes = [body[at : at + 32] for at in range(0, len(body), 32)]
    kind = data.draw(st.sampled_from(["byte", "cut", "append", "order", "leave out", "repeat"]))
    if kind == "byte":
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    elif kind == "cut":
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "append":
        changed = whole + data.draw(st.binary(min_size=1, max_size=40))
    elif kind == "order":
        changed = head + b"".join(data.draw(st.permutations(boxes)))
    elif kind == "leave out":
        out = data.draw(st.integers(0, len(boxes) - 1))
        changed = head + b"".join(boxes[:out] + boxes[out + 1 :])
    else:
        twice = data.draw(st.integers(0, len(boxes) - 1))
        changed = head + b"".join(boxes[: twice + 1] + boxes[twice:])
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(changed)
    if changed == whole:
        assert sealer.open(path, *PLACE) == bytes(size)
        return
    with pytest.raises(StoreProblem, match=r"found (a content that was not|it in clear)"):
        sealer.open(path, *PLACE)


def test_a_box_of_another_file_of_the_same_place_is_refused(tmp_path, sealer):
    """An earlier content of the same file, whose boxes have the same numbers."""
    one, two = (b"".join(sealer.seal((each * 40,), *PLACE)) for each in (b"1", b"2"))
    path = tmp_path / "f"
    path.write_bytes(one[: HEAD + 32] + two[HEAD + 32 :])
    with pytest.raises(StoreProblem, match="not encrypted for this place"):
        sealer.open(path, *PLACE)


def test_a_file_in_clear_is_named_with_the_way_out(tmp_path, sealer):
    path = tmp_path / "f"
    for data in (b"", b"fedcore", b"a model in clear"):
        path.write_bytes(data)
        with pytest.raises(StoreProblem, match="f: found it in clear") as error:
            sealer.open(path, *PLACE)
        assert "`keystore encrypt`" in error.value.remedy
    with pytest.raises(FileNotFoundError):
        sealer.open(tmp_path / "none", *PLACE)


def test_a_sealer_prints_no_key(sealer):
    assert KEY.reveal().hex() not in repr(sealer) and "00010203" not in f"{sealer}"
