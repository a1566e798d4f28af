"""What each script's JSON config may hold; `config` reads it, and hands these classes on."""
