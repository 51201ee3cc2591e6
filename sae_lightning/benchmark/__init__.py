"""Scoring finished runs in one pass over a store."""
