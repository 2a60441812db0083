"""Runs the lines of batches."""
