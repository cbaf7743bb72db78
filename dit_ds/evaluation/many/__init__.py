"""Many pictures segmented: in batches, in tiles, into a folder of results that can be gone on with."""
