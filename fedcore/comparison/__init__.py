"""What was lost against pooling the data: metrics as per-site sums, and gaps with intervals."""
