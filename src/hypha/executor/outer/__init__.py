"""The outer step of DiLoCo: which updates count, how they add up, what comes of theta."""
