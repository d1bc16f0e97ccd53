"""A session from accept to close."""
