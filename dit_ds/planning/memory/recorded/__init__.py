"""Recorded histories of CUDA's caching allocator: read, followed event by event, and replayed under other settings."""
