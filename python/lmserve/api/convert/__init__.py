"""Converts the fields of requests into the core's terms, for several routes."""
