"""The simulated device, the race detector of all code that moves bytes to and from a device."""
