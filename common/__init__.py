"""What every script needs and no part of it is about codecs: files, pictures, weights, processes."""
