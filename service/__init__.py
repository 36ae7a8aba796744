"""The REST service: it owns the job table, and everything that speaks HTTP. Never imports `worker`."""
