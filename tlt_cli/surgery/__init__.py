"""Surgeries: from a fitted header to a Plan. Nothing here opens a file."""
