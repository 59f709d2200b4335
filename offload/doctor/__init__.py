"""Facts about a machine, and what to mend: pure readers, one table, one JSON."""
