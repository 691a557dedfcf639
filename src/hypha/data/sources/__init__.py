"""What datasets are prepared from: files of every kind as streams of blocks."""
