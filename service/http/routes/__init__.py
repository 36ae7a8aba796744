"""The routes. They translate between HTTP and the rest of the service; they do not query, decide or format."""
