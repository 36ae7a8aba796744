"""The job table: its rows, every transition of a status, and what is read from it.

Imports `service.database`; knows no file of a job (`service.storage` imports this package), no HTTP and no torch.
"""
