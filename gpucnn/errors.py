"""The errors that are gpucnn's own. A wrong value is a ValueError, a wrong type a TypeError."""


class GpucnnError(Exception):
    """Every error below; each message says what was wrong, what is accepted and what to do."""


class BackendError(GpucnnError):
    """The backend that was asked for cannot work on this machine, or has too little memory."""


class KernelError(GpucnnError):
    """A .cu file is missing, cannot be read, or does not compile."""


class DataError(GpucnnError):
    """A data file is missing, damaged or not what it claims to be."""


class CheckpointError(GpucnnError):
    """Saved weights are damaged or do not fit the model."""


class ModelFormatError(GpucnnError):
    """The description that a saved model carries cannot be turned back into a model."""


class TrainingError(GpucnnError):
    """Training cannot go on: the loss is not finite."""
