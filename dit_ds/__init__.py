"""dit-ds: Deep Instruction Tuning for Segment Anything, trained at scale on DeepSpeed."""

__version__ = "0.1.0"
