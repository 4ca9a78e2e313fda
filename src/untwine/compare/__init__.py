"""Comparisons over seeds: which arm does better, and how sure one can be of it."""
