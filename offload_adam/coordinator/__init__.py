"""The control plane: how ranks start, agree and end together."""
