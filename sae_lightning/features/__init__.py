"""Feature stores: extraction, reading and streaming."""
