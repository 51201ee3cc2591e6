"""What a trained dictionary is used for: naming, search, bias, stability, steering, judgements of people, exploring."""
