"""When bytes move: residency, lanes, scheduling and the swapping of each tensor class."""
