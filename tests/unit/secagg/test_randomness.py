"""Keys, masks and encryption take the operating system's randomness, and nothing else (PROTOCOL Z)."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.chunks import read_chunk

import fedcore
from fedcore.secagg.crypto.bfv import EncryptedSealer, PublicContext, SecretContext
from fedcore.secagg.crypto.bfv_chunks import SEEDED
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.packing import RINGS
from fedcore.seeds import derive_seed, generator

PACKAGE = Path(fedcore.__file__).parent
SOURCES = sorted(
    path
    for folder in (PACKAGE, PACKAGE.parent / "server", PACKAGE.parent / "clients")
    for path in folder.rglob("*.py")
)
RING = RINGS[0]

# Every way of these bindings to give SEAL a generator or a seed of one's own.
GENERATORS = {
    "set_random_generator", "random_generator", "prng_seed_type", "prng_type",
    "Blake2xbPRNG", "Blake2xbPRNGFactory", "Shake256PRNG", "Shake256PRNGFactory",
    "UniformRandomGeneratorInfo", "RandomToStandardAdapter", "random_uint64", "use_random_seed",
}  # fmt: skip
SEEDED_MODULES = ("fedcore.seeds", "random", "numpy.random")


CRYPTO = sorted((PACKAGE / "secagg" / "crypto").rglob("*.py"))
"""The modules that a run's seed must not reach."""

# ------------------------------------------------------------------------------- source scanning


def words_of(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name, attribute, keyword, import and string constant (for getattr), with its line."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.Constant(value=str(word)):
                yield word, line
            case ast.keyword(arg=str(word)) | ast.arg(arg=word):
                yield word, line
            case ast.alias(name=name, asname=asname):
                yield from ((word, line) for word in (*name.split("."), asname or ""))


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Dotted names a module imports, `from a import b` as both `a` and `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sets_a_generator(source: str) -> list[str]:
    return [
        f"{word} at line {line}" for word, line in words_of(ast.parse(source)) if word in GENERATORS
    ]


def takes_a_seed(source: str) -> list[str]:
    """What a module under secagg/crypto may not do: import seeded randomness, or take or pass a seed."""
    tree = ast.parse(source)
    found = [name for name in imports_of(tree) if name.startswith(SEEDED_MODULES)]
    for node in ast.walk(tree):
        match node:
            case (
                ast.arg(arg="seed" | "rng" | "generator" as word)
                | ast.keyword(arg="seed" | "rng" as word)
            ):
                found.append(word)
            case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"):
                found.append("numpy.random")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_source_sets_seals_generator(path):
    assert sets_a_generator(path.read_text()) == []


@pytest.mark.parametrize("path", CRYPTO, ids=lambda p: p.name)
def test_nothing_under_crypto_knows_a_seed(path):
    assert takes_a_seed(path.read_text()) == []


def test_the_scans_cover_the_packages_and_find_what_they_forbid():
    assert PACKAGE / "secagg" / "crypto" / "bfv.py" in SOURCES
    assert PACKAGE / "secagg" / "crypto" / "pairwise.py" in CRYPTO
    assert PACKAGE / "experiment" / "simulation.py" in SOURCES
    for guilty in (
        "parameters.set_random_generator(factory)",
        "from tenseal.sealapi import Blake2xbPRNGFactory",
        "import tenseal.sealapi.Shake256PRNGFactory as f",
        "getattr(parameters, 'set_random_generator')(f)",
        "f(prng_type=1)",
    ):
        assert sets_a_generator(guilty), guilty
    for guilty in (
        "from fedcore.seeds import generator", "from fedcore import seeds", "import fedcore.seeds",
        "import random", "from random import randbytes", "import numpy.random", "from numpy import random",
        "import numpy as np\nkey = np.random.bytes(32)", "from numpy.random import default_rng",
        "def protect(slots, seed): ...", "def protect(slots, *, rng): ...", "encrypt(slots, seed=3)",
    ):  # fmt: skip
        assert takes_a_seed(guilty), guilty
    for innocent in ("import os\nkey = os.urandom(32)", "import secrets", "import numpy as np"):
        assert not takes_a_seed(innocent)


# ------------------------------------------------------- attack 4, and that nothing here allows it


def seeded_context() -> PublicContext:
    """A context as the tests forbid it: SEAL's generator set to a fixed seed."""
    public = PublicContext(RING, 40)
    api = public.api
    parameters = api.EncryptionParameters(api.SCHEME_TYPE.BFV)
    parameters.set_poly_modulus_degree(RING.degree)
    parameters.set_coeff_modulus([api.Modulus(RING.modulus)])
    parameters.set_plain_modulus(1 << 40)
    parameters.set_random_generator(api.Blake2xbPRNGFactory(list(range(8))))
    public.seal = api.SEALContext(parameters, False, api.SEC_LEVEL_TYPE.TC128)
    return public


def guessed_difference(public: PublicContext, one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """m1 - m2 mod t read off two uploads, with public parameters and no key."""
    sealer = EncryptedSealer(SecretContext(public))
    words = [
        read_chunk(public, SEEDED, next(sealer.protect(slots))).words[0].astype(object)
        for slots in (one, two)
    ]
    q, t = RING.modulus, 1 << public.slot_bits
    return np.array([(t * ((a - b) % q) + q // 2) // q % t for a, b in zip(*words, strict=True)])


def test_attack_4_a_seeded_generator_shows_differences_without_the_key():
    rng = np.random.default_rng(4)
    one, two = rng.integers(0, 1 << 40, (2, RING.degree), dtype=np.uint64)
    true = (one.astype(object) - two.astype(object)) % (1 << 40)
    # The control: read in 2048 of 2048 places.
    assert (guessed_difference(seeded_context(), one, two) == true).sum() == RING.degree
    # As it is: not in one.
    assert (guessed_difference(PublicContext(RING, 40), one, two) == true).sum() == 0


def test_seeding_python_and_numpy_changes_nothing_under_crypto():
    slots = np.zeros(RING.degree, dtype=np.uint64)
    public, seen = PublicContext(RING, 40), set()
    for _ in range(3):
        random.seed(0)
        np.random.seed(0)
        secret = SecretContext(public)
        sealer = EncryptedSealer(secret)
        seen |= {secret.group._key, GroupSecret()._key}
        chunks = [next(sealer.protect(slots)) for _ in range(3)]
        seen |= set(chunks)
        seen |= {chunk[20:85] for chunk in chunks}  # the public seeds of c1
    assert len(seen) == 3 * (2 + 3 + 3)


def test_every_ciphertext_of_one_vector_has_its_own_seed():
    public = PublicContext(RING, 40)
    sealer = EncryptedSealer(SecretContext(public))
    (chunk,) = sealer.protect(np.zeros(16 * RING.degree, dtype=np.uint64))
    parsed = read_chunk(public, SEEDED, chunk, 16)
    assert len({seed.tobytes() for seed in parsed.seeds}) == 16
    assert len({row.tobytes() for row in parsed.words}) == 16


# ------------------------------------------------------------------------------- a run's own seeds


def test_derived_seeds_depend_on_every_word_and_on_nothing_else():
    words = [
        (0, 1, "a", "train"), (1, 1, "a", "train"), (0, 2, "a", "train"), (0, 1, "b", "train"),
        (0, 1, "a", "rounding"), (0, 11, "", "a"), (0, 1, "1a", "train"), (0, 1, "a,5", "train"),
        (0, 1, "1", "a"), (1, 1, "", "1a"), (11, 1, "", "a"), (1, 11, "", "a"),
    ]  # fmt: skip
    seeds = [derive_seed(*word) for word in words]
    assert len(set(seeds)) == len(words)
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    assert seeds == [derive_seed(*word) for word in words]
    random.seed(1)
    np.random.seed(1)
    first = generator(0, 1, "a", "train").random(3)
    generator(5, 5, "x", "y").random(100)
    assert (generator(0, 1, "a", "train").random(3) == first).all()
