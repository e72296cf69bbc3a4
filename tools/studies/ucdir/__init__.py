"""Trained systems on test sets, by a plan; what tools/study_ucdir.py runs."""
