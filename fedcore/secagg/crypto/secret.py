"""The base of all secret types: redacted, not comparable, not hashable, not picklable."""


class Secret:
    """Prints redacted; comparing with ==, hashing and pickling raise TypeError."""

    __slots__ = ()
    __hash__ = None  # type: ignore[assignment]  # a secret is no dictionary key

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<redacted>)"

    def __eq__(self, other: object) -> bool:
        raise TypeError("secrets are not compared with ==")

    def __reduce__(self) -> str:
        raise TypeError(f"a {type(self).__name__} is never pickled")


class SecretBytes(Secret):
    """Key material that is passed inside one process, or to the process' own journal.

    Only `reveal` returns it; only `protocol/wire_form.py` serialises it, into journal records.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def reveal(self) -> bytes:
        return self._value
