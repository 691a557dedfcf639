"""Leases as the scheduler holds them: which offers to take, when to renew, whom to let go."""
