"""Weights of other libraries, read into our layouts."""
