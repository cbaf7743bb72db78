"""Data: REFER trees to records, records to shards, shards to batches. Knows nothing of torch.distributed."""
