"""File engines: how whole pages travel between a file and memory."""
