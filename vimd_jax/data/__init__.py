"""Images: where they come from (sources), how they are cropped (geometry), how they become batches (pipeline)."""
