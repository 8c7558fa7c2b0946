"""Prediction of a run before it is started: bytes by category, and the time of a step.

inputs      Training and Machine: what is predicted, and for which machine
prediction  bytes of a rank by category
timing      seconds of a step: by resource, and the timeline of an overlapped step
advice      whether the plan fits, settings that would change it, and the largest model
tables      the tables that `offload-adam plan` prints
"""
