"""Training and testing, whichever engine runs them: set-up, tasks, steps, stopping, validation."""
