"""Support that several test folders share."""
