"""Certificates by a closed formula, most of them from the literature; one file each."""
