"""The `specdec` command: it parses, calls the library and prints."""
