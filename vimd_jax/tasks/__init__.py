"""Tasks, a file each: what a network learns from an image. The stages of training that use them: config.STAGES."""
