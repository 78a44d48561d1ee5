"""Responses: one result in the format that the client asked for."""
