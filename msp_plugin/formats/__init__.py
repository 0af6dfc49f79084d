"""Sparse tensor formats: pack and unpack, with torch alone."""
