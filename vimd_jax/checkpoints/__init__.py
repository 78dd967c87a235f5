"""The files of a run: networks (format, description, trained_model), weights adapted to a new task (adapt) and training
states (training_state).
"""
