"""A PostgreSQL gateway whose operator decides, by a script of their own, who logs in and as whom."""

from importlib.metadata import version

__version__ = version("pgauthproxy")
