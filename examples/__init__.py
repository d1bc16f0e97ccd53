"""Authenticators to start from. The package carries them for `pgauthproxy demo`."""
