"""Runs that show or measure what the engine does, with nothing printed here. What they say and draw is data first."""
