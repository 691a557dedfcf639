"""The inner loop of DiLoCo: batches, the inner optimizer, one device or several."""
