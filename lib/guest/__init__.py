"""What the guest is told: the seed, its network, keys."""
