"""Models on a hub: their names, their files on the hub, and the cache on this machine."""
