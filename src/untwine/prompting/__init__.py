"""From a state to token ids, and from sampled text back to a command."""
