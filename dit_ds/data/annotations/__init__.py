"""Readers of published annotation files (REFER, gREFER, COCO, parquet), and the combination of several datasets."""
