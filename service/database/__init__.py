"""Opening a database, its schema's versions, and word of its changes. Knows no job."""
