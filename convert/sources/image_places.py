"""From what `--images` names to the store that reads it."""

from __future__ import annotations

import os
import tarfile
import zipfile

from convert.sources.archive_images import ArchiveImages
from convert.sources.bucket_images import BucketImages
from convert.sources.files import is_url
from convert.sources.image_stores import ImageFolder, ImageStore

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def open_images(images: str, max_image_bytes: int) -> ImageStore:
    """Opens the place that images are in; whether it is there, `ImageStore.check` tells.

    Args:
        images: A folder, a zip, a tar, a bucket's prefix, or the URL of a zip or a tar.
        max_image_bytes: Larger images are rejected.
    """
    if is_url(images):
        kind = ArchiveImages if images.endswith(_ARCHIVES) else BucketImages
        return kind(images, max_image_bytes)
    if os.path.isfile(images) and (
        images.endswith(_ARCHIVES) or zipfile.is_zipfile(images) or tarfile.is_tarfile(images)
    ):
        return ArchiveImages(images, max_image_bytes)
    return ImageFolder(images, max_image_bytes)
