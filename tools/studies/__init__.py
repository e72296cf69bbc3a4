"""Studies of both systems; what tools/study_bird.py and tools/study_ucdir.py run. Not in the wheel."""
