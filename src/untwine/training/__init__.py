"""Training: demonstrations, cold start, the reinforcement-learning loop, run directories."""
