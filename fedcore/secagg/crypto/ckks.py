"""CKKS through TenSEAL's vectors, as other frameworks use it: for `fedcore bench protect` only.

CKKS computes on approximate numbers, and a decrypted value carries the encryption noise in its last
digits. A party that has that value and the ciphertext can subtract the two and solve for the secret
key: Li and Micciancio 2021, "On the Security of Homomorphic Encryption on Approximate Numbers"
(EUROCRYPT 2021, ePrint 2020/1533). In a federation the sites decrypt, publish or deploy exactly
such values while the coordinator holds the ciphertexts. So this is never a protection of a run:
nothing outside `fedcore/bench/` imports it, and no plan can name it.

Parameters: symmetric keys, degree 8192, coefficient modulus of 60, 40 and 40 bits, scale 2^40 (the
context of NVFlare's HEBuilder), one thread. `protect` makes one CKKSVector of the whole vector, as
others do with a layer; `protect_blocks` one per ciphertext, the fastest way found (a sixth faster).
"""

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedcore.errors import Unavailable
from fedcore.types import FloatVector, WideVector

DEGREE = 8192
COEFFICIENT_BITS = (60, 40, 40)
SCALE = 2.0**40
SLOTS = DEGREE // 2
"""Values in one ciphertext."""


def _tenseal() -> Any:
    try:
        import tenseal
    except Exception as error:  # a broken wheel raises ImportError, OSError or worse
        raise Unavailable(
            f"ckks: tenseal cannot be used here ({type(error).__name__}: {error})",
            remedy="install tenseal 0.3.16 or newer",
        ) from error
    return tenseal


def new_context() -> Any:
    """A fresh TenSEAL context with its secret key, which every site of a benchmark shares."""
    tenseal = _tenseal()
    context = tenseal.context(
        tenseal.SCHEME_TYPE.CKKS,
        DEGREE,
        coeff_mod_bit_sizes=list(COEFFICIENT_BITS),
        encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        n_threads=1,
    )
    context.global_scale = SCALE
    return context


def protect(context: Any, vector: FloatVector) -> list[bytes]:
    """(d,) float32 to one serialised CKKSVector of ceil(d / 4096) ciphertexts."""
    # TenSEAL prints a warning about matrix products to stdout, where a command's JSON goes.
    with contextlib.redirect_stdout(io.StringIO()):
        return [_tenseal().ckks_vector(context, vector).serialize()]


def protect_blocks(context: Any, vector: FloatVector) -> list[bytes]:
    """(d,) float32 to ceil(d / 4096) serialised CKKSVectors of one ciphertext each."""
    tenseal = _tenseal()
    return [
        tenseal.ckks_vector(context, vector[start : start + SLOTS]).serialize()
        for start in range(0, len(vector), SLOTS)
    ]


def fold(context: Any, running: Sequence[Any], chunks: Iterable[bytes]) -> list[Any]:
    """The running sum with one site's chunks added; an empty `running` starts one."""
    tenseal = _tenseal()
    loaded = [tenseal.ckks_vector_from(context, chunk) for chunk in chunks]
    if not running:
        return loaded
    return [total + one for total, one in zip(running, loaded, strict=True)]


def serialise(running: Sequence[Any]) -> list[bytes]:
    """The chunks of a folded sum."""
    return [total.serialize() for total in running]


def unprotect(context: Any, chunks: Iterable[bytes]) -> WideVector:
    """The chunks of a folded sum to its (d,) float64 values, approximately."""
    tenseal = _tenseal()
    parts = [tenseal.ckks_vector_from(context, chunk).decrypt() for chunk in chunks]
    return np.concatenate([np.zeros(0), *(np.asarray(part, dtype=np.float64) for part in parts)])
