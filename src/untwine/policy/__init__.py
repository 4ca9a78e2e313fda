"""The language model that acts: loading, sampling, scoring."""
