"""Measures OpenAI-compatible servers over HTTP: `lmserve bench`. Knows nothing of this package's own server."""
