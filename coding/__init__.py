"""Integer latents become files, and files pictures; nothing here knows of refinement."""
