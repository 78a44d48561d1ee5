"""One outcome in the form that the client asked for: image, sheet, animation, numbers, archive, JSON."""
