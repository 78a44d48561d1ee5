"""Training images, read into memory from a folder, an ``.npz``, or idx files as MNIST's."""

from model.data.dataset import DataError, Dataset, NoTestImages, Split, fit, listed
from model.data.load import load

__all__ = ["DataError", "Dataset", "NoTestImages", "Split", "fit", "listed", "load"]
