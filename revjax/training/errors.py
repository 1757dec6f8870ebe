"""The two ways a run can be refused or fail that are the user's to mend: each is one sentence."""


class ConfigError(Exception):
    """A command line or config that cannot be run; `train.py` prints it and exits with code 2."""


class TrainingError(Exception):
    """A run that cannot start or go on; `train.py` prints it and exits with code 1."""
