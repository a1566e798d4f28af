"""Refining the latents of images."""
