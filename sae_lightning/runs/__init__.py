"""What lies in a run's folder: its name, its state, its scores, opening it."""
