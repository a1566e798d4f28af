"""Exact, fast forms of the networks' layers, and tiles that bound the memory of large images."""
