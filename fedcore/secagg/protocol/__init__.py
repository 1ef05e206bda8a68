"""The round protocol as two machines without input or output (docs/protocol.md)."""
