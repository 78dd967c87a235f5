"""The tasks that networks learn, a file each. The stages of training that use them: config.STAGES."""
