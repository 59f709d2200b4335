"""Recipes: flat example scripts, each with a YAML file that holds its command and its figures."""
