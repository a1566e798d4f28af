"""Exact, fast forms of a decoder's layers; pictures of any size in bounded memory."""
