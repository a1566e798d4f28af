"""Codes integer latents into files and decodes files into images; independent of refinement."""
