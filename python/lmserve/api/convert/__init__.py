"""From a request's fields to the core's terms, for several routes."""
