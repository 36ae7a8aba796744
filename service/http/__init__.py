"""The HTTP interface: routes, schemas, error responses and middleware."""
