"""Parameters that are sharded over ranks."""
