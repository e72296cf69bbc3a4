"""BIR-D's claims, checked: every system on the same degraded images, cell by cell; what tools/study_bird.py runs.

cases: degradations and images; classical: scikit-image's systems; cells: one system on one case; parts: which cells
there are, and running them; tables: what comes out. trained: trained systems on test sets, by a plan; what
tools/study_ucdir.py runs.
"""
