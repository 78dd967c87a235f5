"""Images: where they come from (sources), how they are cut (transforms) and how they reach a training (pipeline)."""
