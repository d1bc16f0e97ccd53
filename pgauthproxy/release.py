"""Which release of pgauthproxy this is."""

import functools
from importlib import metadata


@functools.cache
def version() -> str:
    """As the installed package says. To be asked for once while its files may be read, before rights are given up."""
    return metadata.version("pgauthproxy")
