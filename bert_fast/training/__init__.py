"""Training: batches by tokens, optimisers, schedules, freezing; every module is imported by its own name."""
