"""What every route shares: bodies, errors, replies, middleware, the OpenAPI document."""
