"""foolbox both ways: its attacks as drivers here, and ours as foolbox attacks."""
