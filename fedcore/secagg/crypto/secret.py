"""What every secret has in common, so that none of it is decided twice."""

from __future__ import annotations


class Secret:
    """Prints redacted, is never compared with ==, hashed or pickled."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]  # a secret is not a dictionary key

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<redacted>)"

    def __eq__(self, other: object) -> bool:
        raise TypeError("secrets are not compared with ==")

    def __reduce__(self) -> str:
        raise TypeError(f"a {type(self).__name__} is never pickled")


class SecretBytes(Secret):
    """Key material on its way between two of its holders inside one process, or to its own journal.

    `reveal` is the only way in; only `protocol/encoding.py` writes it, into journal records.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        """The bytes themselves."""
        return self._value
