"""What learning sees of the world: rows of one site, tables, partitions and the built-in tasks."""
