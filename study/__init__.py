"""The study of the paper's claims: finished comparisons become small tables and plots."""
