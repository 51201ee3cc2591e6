"""The one pass over a store that feeds all metrics, and the scores that follow from it."""
