"""What benchmark.py times: the loops of this project, and plain ones beside them."""
