"""Checkpoints as earlier versions wrote them, which every later version must load."""
