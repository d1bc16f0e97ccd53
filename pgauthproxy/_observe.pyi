from collections.abc import Callable
from typing import final

@final
class Observer:
    def __init__(self, on_statement: Callable[[bool, bytes, int], object] | None = None, max_text: int = 0) -> None: ...
    @property
    def idle_since(self) -> float | None: ...
    @property
    def in_transaction(self) -> bool: ...
