"""The loops that benchmark.py times: those of this project, and plain ones for comparison."""
