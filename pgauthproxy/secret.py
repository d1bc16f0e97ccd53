"""A value that never shows itself: not in a repr, a log line, an f-string or a traceback."""

import hmac
from typing import Final, final


@final
class Secret:
    """A credential on its way through the gateway; `reveal` is the one way to its bytes."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value: Final = value

    def reveal(self) -> bytes:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __eq__(self, other: object) -> bool:
        """Compares in constant time."""
        return isinstance(other, Secret) and hmac.compare_digest(self._value, other._value)

    __hash__ = None  # type: ignore[assignment]  # a secret is no dictionary key

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a secret is not pickled")
