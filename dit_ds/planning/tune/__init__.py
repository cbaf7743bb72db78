"""The search for the fastest settings that fit."""
