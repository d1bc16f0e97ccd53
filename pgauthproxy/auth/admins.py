"""Who may in at the admin console by a password: names with SCRAM verifiers, from the configuration."""

import hmac
from collections.abc import Mapping as Names

from pgauthproxy.auth.model import Question, UnknownUser
from pgauthproxy.proto import scram
from pgauthproxy.secret import Secret
from pgauthproxy.stages import Mapping


class AdminsAuthenticator:
    """Gives the verifier that a client is held to. Who is not there is held to one that is made up from `seed`."""

    def __init__(self, verifiers: Names[bytes, Secret], seed: Secret) -> None:
        """Each of the verifiers, of which there is at least one, is a SCRAM verifier."""
        self._verifiers = verifiers
        self._seed = seed
        parsed = (scram.Verifier.parse(verifier.reveal()) for verifier in verifiers.values())
        self._iterations = [each.iterations for each in parsed if each is not None]

    async def start(self) -> None:
        """Nothing is needed."""

    async def ask(self, question: Question) -> Mapping:
        name = question.started.user
        # For everybody, so that it does not take longer for those who do not exist.
        seed = self._seed.reveal()
        lot = int.from_bytes(hmac.digest(seed, b"iterations " + name, "sha256")[:8])
        iterations = self._iterations[lot % len(self._iterations)]
        made_up = Secret(scram.Verifier.made_up(name, seed, iterations).text())
        verifier = self._verifiers.get(name)
        if verifier is None:
            raise UnknownUser("no user of the admin console", verifier=made_up)
        return Mapping((), question.started.parameters, None, verifier)

    async def reload(self) -> None:
        """Nothing: it is made anew."""

    async def close(self) -> None:
        """Nothing is held."""
