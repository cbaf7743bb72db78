"""Annotations as they are published: REFER, COCO, parquet; and combined."""
