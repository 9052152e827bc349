"""Images on disk to batches on a device: writing, verifying and loading FFCV's .beton files."""
