"""The data folder: its installation id, where the files of a job lie, which have no row, and which are damaged.

Imports `service.database` and the tables of `service.jobs`; knows no HTTP and no torch.
"""
