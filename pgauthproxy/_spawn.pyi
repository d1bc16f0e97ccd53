from typing import Final, final

BY_EXIT: Final[int]
BY_TIMEOUT: Final[int]
BY_STOP: Final[int]
BY_FLOOD: Final[int]

@final
class Stop:
    def __init__(self) -> None: ...
    def set(self) -> None: ...

@final
class Outcome:
    @property
    def ended_by(self) -> int: ...
    @property
    def status(self) -> int: ...
    @property
    def output(self) -> bytes: ...
    @property
    def errors(self) -> bytes: ...
    @property
    def errors_dropped(self) -> int: ...

@final
class Command:
    def __init__(self, argv: list[bytes], environment: list[bytes]) -> None: ...
    def run(
        self,
        data: bytes,
        stop: Stop,
        timeout_seconds: float,
        grace_seconds: float,
        max_output: int,
        max_errors: int,
    ) -> Outcome: ...

def keep_descriptors_private() -> None: ...
