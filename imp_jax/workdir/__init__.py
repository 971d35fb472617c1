"""What a run keeps on disk and prints."""
