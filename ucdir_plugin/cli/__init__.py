"""Running what was parsed, a module for each command; tools/ has the parsers."""
