"""What clients keep on the server in addition to sessions and responses, in one database."""
