"""Data sets by name, the order of their examples, and augmentation on the device."""

from revjax.data.augment import augment as augment
from revjax.data.augment import mean_image as mean_image
from revjax.data.augment import normalize as normalize
from revjax.data.augment import random_crop_flip as random_crop_flip
from revjax.data.dataset import DataError as DataError
from revjax.data.dataset import Dataset as Dataset
from revjax.data.dataset import DatasetInfo as DatasetInfo
from revjax.data.load import DATASETS as DATASETS
from revjax.data.load import dataset_info as dataset_info
from revjax.data.load import load_dataset as load_dataset
from revjax.data.order import batch_indices as batch_indices
