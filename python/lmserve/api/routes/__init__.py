"""One file for each route: from its request to the core, and back."""
