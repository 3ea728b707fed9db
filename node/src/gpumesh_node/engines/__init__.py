"""Engines: what computes. One adapter per file, all behind base.Engine."""
