"""``offload plan``: where a model comes from, on which machine it would run, and the answer."""
