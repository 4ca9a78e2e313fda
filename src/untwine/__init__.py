"""Untwine: agentic reinforcement learning that separates good actions from bad ones."""

__version__ = "0.1.0"
