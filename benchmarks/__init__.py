"""Measurements, and the plain-Python references that the compiled modules are held to."""
