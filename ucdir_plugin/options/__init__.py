"""Option files: read safely, checked strictly, completed with defaults."""
