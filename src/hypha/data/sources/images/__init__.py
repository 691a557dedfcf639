"""Directories of images, decoded."""
