"""Measuring the links of a machine, within seconds and without leaving anything behind."""
