"""Prediction of a run before it is started: bytes by category, and the time of a step.

inputs        Training and Machine: what is predicted, and for which machine
shape         sizes of a model's layers, and the activations that they save
cards         memory of GPUs by name
prediction    bytes of a rank by category
setup         a model, how it is trained, and how FSDP2 shards it
advice        whether it fits, changes that make it fit, and the largest model
alternatives  what other optimizers need for the same model
timing        seconds of a step: by resource, and the timeline of an overlapped step
tables        the tables that `offload-adam plan` prints
"""
