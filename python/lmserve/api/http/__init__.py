"""Shared by all routes: bodies, errors, replies, middleware, and the OpenAPI document."""
