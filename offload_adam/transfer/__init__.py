"""Copies and collectives: the streams that they run on, and the buffers that they use.

streams         the streams of one device, and events on them; start here
stream_waits    the waits between them, as layout.schedule asks for
collectives     the mean of gradients and the all-gather of parameters
slots           buffers that buckets use in turn
"""
