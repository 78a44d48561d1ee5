"""One outcome in the form that the client asked for: picture, sheet, animation, numbers, archive, JSON."""
