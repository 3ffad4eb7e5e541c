"""Training: optimizer, schedules, loss, loop, checkpoints, validation, report."""
