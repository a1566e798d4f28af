"""The schemas of the scripts' JSON configs; import them from `config`, which reads the files."""
