"""What clients keep on the server beside sessions and responses, in one database."""
