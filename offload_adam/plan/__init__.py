"""What a run will need before it is started: bytes by category, and the time of a step.

inputs      Training and Machine: the question
prediction  bytes of a rank by category
timing      seconds that a step spends on each resource
overlap     timeline of a step whose updates overlap the model's work
advice      whether it fits, which settings would change that, and the largest model
tables      all of it as tables for users
"""
