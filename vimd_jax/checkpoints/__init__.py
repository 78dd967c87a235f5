"""What a run leaves on disk: networks (network.py), fitted to a new task (adapt.py), and the state of a training
(training_state.py).
"""
