"""Certificates for perturbed token measures: copies, couplings and Wasserstein balls."""
