"""Requests and answers as clients see them: plain words, ranges, examples."""
