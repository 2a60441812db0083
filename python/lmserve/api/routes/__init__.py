"""One file per route: from its request to the core, and back."""
