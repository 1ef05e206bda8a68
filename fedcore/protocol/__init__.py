"""The round protocol as two machines without input or output (PROTOCOL s3, docs/protocol.md)."""
