"""scripts/wheelhouse: lists, SBOM, sums and signature of a folder of wheels, and what `verify` refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from support.scripts import load_script

from fedcore.errors import AlreadyExists, BadInput, Refused


@pytest.fixture(scope="module")
def script():
    return load_script("wheelhouse")


def wheel(folder, name, version, *lines):
    inside = f"{name}-{version}.dist-info/METADATA"
    about = [f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}", *lines]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(inside, "\n".join(about) + "\n\nA description: not a header.\n")


def public_pem(key):
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def house(script, tmp_path):
    """A signed wheelhouse of three wheels, with the operator's public key beside it."""
    out = tmp_path / "house"
    (out / "wheels").mkdir(parents=True)
    wheel(
        out / "wheels", "fedcore_fl", "0.1.0", "License-Expression: Apache-2.0", "Requires-Dist: torch<3,>=2.6",
        "Requires-Dist: absent>1; python_version < '3'", "Requires-Dist: matplotlib; extra == 'report'",
    )  # fmt: skip
    wheel(out / "wheels", "torch", "2.13.0+cpu", "License: BSD-3-Clause", "Requires-Dist: Mark.up")
    wheel(out / "wheels", "mark_up", "3.0")
    key = Ed25519PrivateKey.generate()
    (tmp_path / "operator.pub").write_bytes(public_pem(key))
    script.finish(out, key)
    return out


def test_every_wheel_is_listed_with_its_hash(script, house):
    lines = (house / "requirements.txt").read_text().splitlines()
    assert [line.split(" ")[0] for line in lines] == [
        "fedcore-fl==0.1.0", "mark-up==3.0", "torch==2.13.0+cpu",
    ]  # fmt: skip
    for line, path in zip(lines, sorted((house / "wheels").iterdir()), strict=True):
        assert line.endswith(f"--hash=sha256:{script.sha256(path)}")


def test_the_sbom_names_versions_licences_and_what_needs_what(house):
    found = json.loads((house / "sbom.cdx.json").read_text())
    assert (found["bomFormat"], found["specVersion"], found["version"]) == ("CycloneDX", "1.6", 1)
    assert re.fullmatch(
        r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", found["serialNumber"]
    )
    ours = found["metadata"]["component"]
    assert (ours["type"], ours["purl"]) == ("application", "pkg:pypi/fedcore-fl@0.1.0")
    assert ours["licenses"] == [{"expression": "Apache-2.0"}]
    others = {each["name"]: each for each in found["components"]}
    assert others["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert others["torch"]["licenses"] == [{"license": {"name": "BSD-3-Clause"}}]
    assert "licenses" not in others["mark-up"]
    for each in (ours, *others.values()):
        assert each["bom-ref"] == each["purl"]
        assert [hash_["alg"] for hash_ in each["hashes"]] == ["SHA-256"]
    needs = {each["ref"]: each["dependsOn"] for each in found["dependencies"]}
    torch, mark = others["torch"]["purl"], others["mark-up"]["purl"]
    assert needs == {ours["purl"]: [torch], torch: [mark], mark: []}


def test_the_sbom_is_valid_by_the_schema_of_cyclonedx(house):
    reason = "cyclonedx-python-lib[json-validation] is not installed"
    validation = pytest.importorskip("cyclonedx.validation.json", reason=reason)
    from cyclonedx.schema import SchemaVersion

    validator = validation.JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str((house / "sbom.cdx.json").read_text()) is None


def test_the_same_wheels_give_the_same_files(script, house):
    before = {path.name: path.read_bytes() for path in house.iterdir() if path.is_file()}
    script.finish(house, None)
    assert {name: (house / name).read_bytes() for name in before} == before


def test_verify_accepts_what_was_signed(script, house):
    assert "5 files match" in script.verify(house, house.parent / "operator.pub")


def test_the_signature_is_checked_by_openssl_alone(house):
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    command = (
        openssl, "pkeyutl", "-verify", "-pubin", "-inkey", house.parent / "operator.pub", "-rawin", "-in",
        house / "SHA256SUMS", "-sigfile", house / "SHA256SUMS.sig",
    )  # fmt: skip
    assert subprocess.run(command, capture_output=True).returncode == 0
    (house / "SHA256SUMS").write_text("another\n")
    assert subprocess.run(command, capture_output=True).returncode != 0


def edit(path):
    path.write_bytes(path.read_bytes() + b"x")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda house: edit(house / "wheels/mark_up-3.0-py3-none-any.whl"), "another content"),
        (lambda house: edit(house / "sbom.cdx.json"), "another content"),
        (lambda house: (house / "requirements.txt").unlink(), "no such file"),
        (lambda house: (house / "wheels/extra.whl").touch(), "does not list"),
        (lambda house: edit(house / "SHA256SUMS"), "found no signature"),
        (lambda house: (house / "SHA256SUMS.sig").write_bytes(bytes(64)), "found no signature"),
        (
            lambda house: (house.parent / "operator.pub").write_bytes(
                public_pem(Ed25519PrivateKey.generate())
            ),
            "found no signature",
        ),
    ],
)
def test_verify_refuses_a_changed_wheelhouse(script, house, change, says):
    change(house)
    with pytest.raises(Refused, match=says) as caught:
        script.verify(house, house.parent / "operator.pub")
    assert caught.value.remedy


def test_verify_needs_a_signature_and_an_ed25519_key(script, house):
    public = house.parent / "operator.pub"
    (house / "SHA256SUMS.sig").unlink()
    with pytest.raises(BadInput, match=r"SHA256SUMS\.sig"):
        script.verify(house, public)
    for content in (public_pem(generate_private_key(SECP256R1())), b"no key"):
        public.write_bytes(content)
        with pytest.raises(BadInput, match="expected one in PEM form"):
            script.verify(house, public)


def test_make_refuses_bad_input_before_it_downloads(script, house, tmp_path):
    with pytest.raises(AlreadyExists, match="expected a new folder"):
        script.make(house, "site", None)
    key = tmp_path / "operator.key"
    private = generate_private_key(SECP256R1())
    key.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key.chmod(0o644)
    with pytest.raises(BadInput, match="expected 0600"):
        script.make(tmp_path / "new", "site", key)
    key.chmod(0o600)
    with pytest.raises(BadInput, match="expected Ed25519"):
        script.make(tmp_path / "new", "site", key)
    assert not (tmp_path / "new").exists()


def test_a_file_that_is_no_wheel_is_named(script, tmp_path):
    broken = tmp_path / "broken-1.0-py3-none-any.whl"
    broken.write_bytes(b"not a zip")
    with pytest.raises(BadInput, match=r"broken-1\.0.*found no wheel"):
        script.describe(broken)
