"""The HTTP interface: routes, schemas, problems and everything that knows a request."""
