"""The round machine: who takes part, when a round is planned, closed and applied. Pure."""
