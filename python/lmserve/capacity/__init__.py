"""Capacity: measures how long a model's steps take, and predicts how servers handle a trace of requests."""
