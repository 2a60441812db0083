"""Measures OpenAI-compatible servers over HTTP: `lmserve bench`. It does not depend on this package's server."""
