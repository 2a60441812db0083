"""Capacity: how long a model's steps take here, and what a trace of requests comes to on servers like this."""
