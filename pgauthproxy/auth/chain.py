"""Several authenticators in a row: the first that lets a client in decides; a failure is no "no" and ends the row."""

from collections.abc import Sequence

from pgauthproxy.auth.model import Authenticator, AuthenticatorConfigError, Denied, Question, UnknownUser
from pgauthproxy.stages import Mapping


class ChainAuthenticator:
    """Asks its links in order until one agrees."""

    def __init__(self, links: Sequence[tuple[str, Authenticator]]) -> None:
        """Each link with the name that it has in the log."""
        self._links = tuple(links)

    async def start(self) -> None:
        for at, (_, link) in enumerate(self._links):
            try:
                await link.start()
            except BaseException:
                for _, started in self._links[:at]:
                    await started.close()
                raise

    async def ask(self, question: Question) -> Mapping:
        reasons = []
        told = verifier = made_up = None
        for name, link in self._links:
            try:
                return await link.ask(question)
            except Denied as denied:
                reasons.append(f"{name}: {denied.reason}")
                told = denied.told or told
                # A user whom one link knows is held to their own, whatever others make up.
                if isinstance(denied, UnknownUser):
                    made_up = made_up or denied.verifier
                else:
                    verifier = verifier or denied.verifier
        raise Denied("; ".join(reasons), told, verifier or made_up)

    async def reload(self) -> None:
        """Reloads each link that can be; the others stay as they are. Raises AuthenticatorConfigError with all."""
        faults: list[str] = []
        for name, link in self._links:
            try:
                await link.reload()
            except AuthenticatorConfigError as error:
                faults += (f"{name}: {fault}" for fault in error.faults)
        if faults:
            raise AuthenticatorConfigError(*faults)

    async def close(self) -> None:
        for _, link in self._links:
            await link.close()
