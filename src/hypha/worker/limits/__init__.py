"""What this machine has, and how an executor is held to what its lease reserved of it."""
