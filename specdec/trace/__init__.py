"""What every round decided and why, in a file: recorded while decoding, replayed and varied without a model."""

from specdec.trace.records import Trace, read_trace, write_trace

__all__ = ["Trace", "read_trace", "write_trace"]
