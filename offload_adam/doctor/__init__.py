"""What this machine gives a run, what is wrong with it, and what to do about that."""
