"""Data sets by name, what is held out of them, their order, and what is done to the images.

What is streamed stands in `revjax.data.stream`, which imports grain and OpenCV.
"""

from revjax.data.augment import augment as augment
from revjax.data.augment import random_crop_flip as random_crop_flip
from revjax.data.color import distort_color as distort_color
from revjax.data.dataset import DataError as DataError
from revjax.data.dataset import Dataset as Dataset
from revjax.data.dataset import DatasetInfo as DatasetInfo
from revjax.data.finish import finish_images as finish_images
from revjax.data.hold_out import HOLD_OUT_SIZES as HOLD_OUT_SIZES
from revjax.data.hold_out import hold_out as hold_out
from revjax.data.load import DATASETS as DATASETS
from revjax.data.load import STREAMED as STREAMED
from revjax.data.load import dataset_info as dataset_info
from revjax.data.load import is_streamed as is_streamed
from revjax.data.load import load_dataset as load_dataset
from revjax.data.load import open_stream as open_stream
from revjax.data.normalization import FIXED_NORMALIZATIONS as FIXED_NORMALIZATIONS
from revjax.data.normalization import NORMALIZATIONS as NORMALIZATIONS
from revjax.data.normalization import Normalization as Normalization
from revjax.data.normalization import find_normalization as find_normalization
from revjax.data.normalization import normalize as normalize
from revjax.data.order import batch_indices as batch_indices
