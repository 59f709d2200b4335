"""The `offload` command line: one module per verb."""
