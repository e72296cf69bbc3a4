"""Measuring images, tables and reports of what was measured, and comparing runs."""
