"""What a run will need before it is started: bytes by category, and the time of a step."""
