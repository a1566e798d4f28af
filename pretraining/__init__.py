"""Pre-training: its data, its step and its run folder."""
