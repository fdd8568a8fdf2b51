"""Certificates in ball arithmetic, rounded outward end to end."""
