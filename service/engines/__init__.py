"""Engines that place, restart and scale workers on many hosts: Ray, Slurm.

An engine sees workers and never jobs; of the database only the length of the queue is read. Knows no HTTP.
"""
