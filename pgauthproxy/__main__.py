"""`python -m pgauthproxy` is the command `pgauthproxy`."""

from pgauthproxy.cli import main

main()
