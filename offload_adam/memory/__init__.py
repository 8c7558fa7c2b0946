"""Host memory for the state, and page-locking (pinning) of it.

arena      HostArena: one mapping, divided into tensors; start here
pinning    page-lock exactly these bytes, and unlock them
planes     the tensors that hold one bucket's state
codes      moments in 8-bit codes; split_master: master weights in two halves
"""
