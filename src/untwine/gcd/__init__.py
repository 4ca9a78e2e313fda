"""GCD, generative classification disentanglement (arXiv 2509.23870): the
same weights that act also learn to say whether an action is good or bad."""
