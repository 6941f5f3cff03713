"""Campaigns of faults: what is broken on purpose, and how often the package survives it."""
