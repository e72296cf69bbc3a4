"""Other programs' ways to use what was trained here."""
