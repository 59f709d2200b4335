"""``offload tune``: a measured search for the settings that make a script's steps shortest."""
