"""Tables, plots and pages of one run and of comparisons."""
