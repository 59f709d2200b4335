"""Where bytes live: tiers, their buffers and files, and the durable store."""
