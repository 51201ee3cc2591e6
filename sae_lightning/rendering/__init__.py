"""Tables, figures, strips of pictures and pages, whatever they show."""
