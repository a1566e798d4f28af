"""Training from scratch: its data, its step, its run folder."""
