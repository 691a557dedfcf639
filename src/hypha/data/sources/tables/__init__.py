"""Rows of named columns: CSV, JSON, Parquet and saved datasets."""
