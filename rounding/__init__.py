"""Registers, finds and calls the functions of `experimental_inference_methods`."""
