"""Images: where they come from (sources), how they are cropped (transforms), how they become batches (pipeline)."""
