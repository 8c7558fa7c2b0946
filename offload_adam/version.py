"""The version of this package; every module can import it from here without a cycle."""

__version__ = "0.2.0"
