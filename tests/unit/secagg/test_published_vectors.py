"""Our wrappers against vectors nobody here wrote: RFCs, NIST, and those that pyca ships for its own tests.

Each goes through the function the protocol calls, so that a wrong order of arguments, byte order, nonce,
counter or key form shows; whether pyca computes rightly is only the second thing this finds.
"""

from __future__ import annotations

from collections.abc import Iterator

import cryptography
import cryptography_vectors
import numpy as np
import pytest

from fedcore.errors import EnvelopeRefused, SignatureRefused
from fedcore.secagg.crypto import identity_key, masking, symmetric
from fedcore.secagg.crypto.hybrid import HybridKey
from fedcore.secagg.crypto.identity_key import IdentityKey, verify
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.crypto.symmetric import hkdf, keystream, open_box, seal_box


def records(path: str) -> list[dict[str, str]]:
    """The blocks of a `key = value` file; a block begins at COUNT. Keys in lower case."""
    found: list[dict[str, str]] = []
    with cryptography_vectors.open_vector_file(path, "r") as lines:
        for line in lines:
            key, equals, value = line.partition("=")
            if not equals or line.startswith(("#", "[")):
                continue
            if key.strip().lower() == "count":
                found.append({})
            found[-1][key.strip().lower()] = value.strip()
    return found


def test_the_vectors_are_those_of_the_library_that_runs():
    assert cryptography_vectors.__version__ == cryptography.__version__


# ------------------------------------------------------------------------------------------ X25519


def pair(x25519: str, seed: bytes = bytes(64)) -> HybridKey:
    return HybridKey(bytes.fromhex(x25519), seed)


def test_x25519_of_rfc_7748_section_5_2():
    vectors = records("asymmetric/X25519/rfc7748.txt")
    assert len(vectors) == 3
    for vector in vectors:
        found = pair(vector["input_scalar"]).agree(bytes.fromhex(vector["input_u"]), "peer")
        assert found.hex() == vector["output_u"]


def test_x25519_of_rfc_7748_iterated_a_thousand_times():
    scalar = u = (9).to_bytes(32, "little")
    for step in range(1000):
        scalar, u = HybridKey(scalar, bytes(64)).agree(u, "peer"), scalar
        if step == 0:
            assert scalar.hex() == records("asymmetric/X25519/rfc7748.txt")[2]["output_u"]
    assert scalar.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


def test_x25519_of_rfc_7748_section_6_1():
    ann = pair("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = pair("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    public = (
        "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
        "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
    )
    assert (ann.public.x25519.hex(), bob.public.x25519.hex()) == public
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert ann.agree(bob.public.x25519, "bob").hex() == shared
    assert bob.agree(ann.public.x25519, "ann").hex() == shared


# ------------------------------------------------------------------------------------------ ML-KEM


def test_ml_kem_768_keys_and_decapsulation_by_seed():
    # z, d, pk, ct, ss: the seed of FIPS 203 is d || z. ct_n is no ciphertext of pk, and ss_n what
    # implicit rejection makes of it.
    vectors = records("asymmetric/MLKEM/kat_MLKEM_768.rsp")
    assert len(vectors) == 1000
    for vector in vectors[:200]:
        byte = {key: bytes.fromhex(value) for key, value in vector.items() if key != "count"}
        key = pair("01" * 32, byte["d"] + byte["z"])
        assert key.public.mlkem == byte["pk"]
        key.public.check("bob")
        assert key.decapsulate(byte["ct"], "ann") == byte["ss"]
        assert key.decapsulate(byte["ct_n"], "ann") == byte["ss_n"]


# ------------------------------------------------------------------------------- HKDF, box, stream


def test_hkdf_sha256_of_rfc_5869():
    vectors = records("KDF/rfc-5869-HKDF-SHA256.txt")
    assert len(vectors) == 3
    for vector in vectors:
        secret, salt, info = (bytes.fromhex(vector[key]) for key in ("ikm", "salt", "info"))
        assert hkdf(secret, salt, info, int(vector["l"])).hex() == vector["okm"]


def text_or_hex(value: str) -> bytes:
    return value[1:-1].encode() if value.startswith('"') else bytes.fromhex(value)


def boxes() -> Iterator[tuple[bytes, ...]]:
    """(key, nonce, plaintext, context, box); the first is RFC 8439's, section 2.8.2."""
    for vector in records("ciphers/ChaCha20Poly1305/boringssl.txt"):
        key, nonce, plain, context, sealed, tag = (
            text_or_hex(vector[name]) for name in ("key", "nonce", "in", "ad", "ct", "tag")
        )
        yield key, nonce, plain, context, sealed + tag


@pytest.fixture
def under(monkeypatch):
    """under(nonce): boxes are sealed and opened under this nonce; Fedcore's own have one for all."""
    return lambda nonce: monkeypatch.setattr(symmetric, "_ONLY_NONCE", nonce)


def test_boxes_of_rfc_8439(under):
    found = list(boxes())
    assert len(found) == 66
    for key, nonce, plain, context, box in found:
        under(nonce)
        assert seal_box(key, plain, context) == box
        assert open_box(key, box, context, sender="ann") == plain


def test_boxes_with_a_wrong_tag_or_context_are_refused(under):
    for key, nonce, plain, context, box in boxes():
        under(nonce)
        assert open_box(key, box, context, sender="ann") == plain
        for wrong, other in ((box[:-1] + bytes([box[-1] ^ 1]), context), (box, context + b"\x00")):
            with pytest.raises(EnvelopeRefused):
                open_box(key, wrong, other, sender="ann")


def test_boxes_of_openssl_and_the_one_it_refuses(under):
    vectors = records("ciphers/ChaCha20Poly1305/openssl.txt")
    assert [vector.get("result") for vector in vectors].count("CIPHERFINAL_ERROR") == 1
    for vector in vectors:
        names = ("key", "iv", "plaintext", "aad", "ciphertext", "tag")
        key, nonce, plain, context, sealed, tag = (bytes.fromhex(vector[name]) for name in names)
        under(nonce.rjust(12, b"\x00"))
        if "result" in vector:
            with pytest.raises(EnvelopeRefused):
                open_box(key, sealed + tag, context, sender="ann")
        else:
            assert open_box(key, sealed + tag, context, sender="ann") == plain


def encrypted(key: str, counter: str, plaintext: str) -> str:
    """Our keystream XOR plaintext, in hex."""
    stream = keystream(bytes.fromhex(key), bytes.fromhex(counter))
    plain = bytes.fromhex(plaintext)
    made = stream.update(bytes(len(plain)))
    return bytes(a ^ b for a, b in zip(made, plain, strict=True)).hex()


def test_aes_256_ctr_of_rfc_3686():
    vectors = records("ciphers/AES/CTR/aes-256-ctr.txt")
    assert len(vectors) == 3
    for vector in vectors:
        found = encrypted(vector["key"], vector["iv"], vector["plaintext"])
        assert found == vector["ciphertext"].lower()


SP800_38A_KEY = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
SP800_38A_COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"


def test_aes_256_ctr_of_sp_800_38a_section_f_5_5():
    plain = (
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    expected = (
        "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6"
    )
    assert encrypted(SP800_38A_KEY, SP800_38A_COUNTER, plain) == expected


def test_masks_are_that_stream_from_counter_zero(monkeypatch):
    # SP 800-38A, F.5.5 again, now through the masks: output blocks in slots of 8 bytes.
    def at_their_counter(key, start):
        assert start == bytes(16), "counter zero"
        return keystream(key, bytes.fromhex(SP800_38A_COUNTER))

    monkeypatch.setattr(masking, "keystream", at_their_counter)
    output = "0bdf7df1591716335e9a8b15c860c5025a6e699d536119065433863c8f657b94"
    found = mask_sum([(bytes.fromhex(SP800_38A_KEY), 1)], 4, 60)
    words = np.frombuffer(bytes.fromhex(output), "<u8") & np.uint64(2**60 - 1)
    assert found.tolist() == words.tolist()


def test_the_first_block_of_a_mask_is_aes_of_zero():
    # FIPS 197's cipher on a zero block under a zero key (NIST's known answers, ECBVarTxt: 256 bits).
    found = mask_sum([(bytes(32), 1)], 2, 60)
    words = np.frombuffer(bytes.fromhex("dc95c078a2408989ad48a21492842087"), "<u8")
    assert found.tolist() == (words & np.uint64(2**60 - 1)).tolist()


# ------------------------------------------------------------------------------------------ Ed25519


def test_ed25519_of_sign_input(monkeypatch):
    # secret || public : public : message : signature || message; what is signed is the message alone.
    monkeypatch.setattr(identity_key, "_signed", lambda label, message: message)
    with cryptography_vectors.open_vector_file("asymmetric/Ed25519/sign.input", "r") as lines:
        vectors = [[bytes.fromhex(part) for part in line.split(":")[:4]] for line in lines]
    assert len(vectors) == 1024
    for secret, public, message, signed in vectors[::5]:
        key = IdentityKey(secret[:32])
        assert key.public == public
        assert key.sign(b"", message) == signed[:64]
        verify(public, b"", message, signed[:64], signer="ann")
        with pytest.raises(SignatureRefused):
            verify(public, b"", message + b"\x00", signed[:64], signer="ann")
