"""The embedded sample set: scenes, their words, and the REFER tree."""
