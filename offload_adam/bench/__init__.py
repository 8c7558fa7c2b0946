"""Measures this machine's limit, this package and its peers in one run, interleaved."""
