"""Reports: pure functions of a run directory."""
