"""What looks after the fleet as a whole; it reads the store and judges, and works through the same intents as everyone else."""
