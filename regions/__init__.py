"""Where in a picture distortion counts more."""
