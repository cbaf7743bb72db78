"""The embedded sample set: drawn scenes, their referring expressions, and the REFER tree."""
