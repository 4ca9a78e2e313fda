"""Many small runs side by side, and what is needed to begin, stop and take them up again."""
