"""The data folder: whose it is, what lies in it, and whether it is undamaged."""
