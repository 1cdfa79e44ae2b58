"""Evaluation: what a compressed cache costs in quality, measured through the cache that serves.

run.py is the whole; kld.py and passkey.py are the two tasks; reference.py keeps the full cache's side.
"""
