"""The executor's end of its worker's bridge."""
