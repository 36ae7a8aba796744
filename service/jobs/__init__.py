"""The job table: its rows, every transition of a status, and what is read from it. Knows no HTTP and no torch."""
