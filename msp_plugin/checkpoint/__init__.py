"""What a run leaves on disk, and the recount of what it holds."""
