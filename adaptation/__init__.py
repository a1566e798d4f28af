"""What the decoder is told beside the latents: how it is fitted to a picture, and what it costs."""
