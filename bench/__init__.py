"""Measures the service against named floors, in the same run and on the same machine."""
