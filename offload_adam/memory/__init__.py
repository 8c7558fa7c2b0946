"""Host memory for the state, and page-locking (pinning) of it.

arena      HostArena: one mapping, divided into tensors; start here
pinning    page-lock exactly these bytes, and unlock them
planes     the tensors that hold one bucket's state
"""
