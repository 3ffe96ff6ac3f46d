"""Relax passes, one a file, and the pipeline that orders them."""
