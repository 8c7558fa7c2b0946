"""Copies and collectives: the streams that run them, and the buffers that they use.

streams         the streams of one device, and events on them; start here
stream_waits    the waits between streams, as layout.schedule plans them
collectives     the mean of gradients and the all-gather of parameters
slots           buffers that buckets share in turn
"""
