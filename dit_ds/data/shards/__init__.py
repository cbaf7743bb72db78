"""WebDataset shards: written, described by a manifest, verified."""
