"""Sockets: listening and dialling."""
