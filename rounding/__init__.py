"""How the functions of `experimental_inference_methods` are registered, found and called."""
