"""Settings: what there is, and where each came from."""
