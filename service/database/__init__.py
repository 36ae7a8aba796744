"""Opening the database, SQLite or PostgreSQL; its transactions, its schema's revisions, its change notifications.

Knows no table: nothing of `service.jobs` is imported here.
"""
