"""What surrounds the loop of refinement: its pace, its noise, its results, polish, targets."""
