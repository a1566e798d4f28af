"""What every script needs and is not about codecs: files, pictures, weights, processes."""
