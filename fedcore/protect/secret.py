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
