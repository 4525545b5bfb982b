"""Writes networks in the formats of other runtimes, and checks the files that were written."""
