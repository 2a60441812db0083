"""Models that are somewhere else: what they are called, what a hub has of them, and the cache on this machine."""
