"""Walkers: a model or a checkpoint → an iterator of `Matrix`, one file for each kind of source."""
