"""What can be watched: spans of time as a protocol with a null version."""
