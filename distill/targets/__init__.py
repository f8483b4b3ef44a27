"""Stored teacher outputs: what a teacher said of every row that counts, written once and read while students train.

A leaf: knows torch, numpy, zstandard and the ground floor. The format is described in README.md.
"""
