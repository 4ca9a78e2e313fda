"""Evaluation: how well a policy does on fixed sets of tasks, and how sure one can be of it."""
