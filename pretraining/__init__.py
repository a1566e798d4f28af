"""What pre-training is made of: its data, its step, its tests and its run folder."""
