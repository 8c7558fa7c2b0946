"""Host memory: who owns which bytes, and which of them are page-locked.

arena      HostArena: one mapping, cut into tensors; start here
pinning    page-locking of exactly these bytes, and its end
planes     the tensors that hold one bucket's state
"""
