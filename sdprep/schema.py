"""Column names and Arrow types: of the table under curation, and of the prepared data set.

The prepared data set is the contract between sdprep and sdtrain. Its version is written into
`sdprep.json` beside the data; readers refuse versions they do not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from sdprep.errors import DataError

SCHEMA_VERSION = 1
MANIFEST = "sdprep.json"

# --- the table under curation -------------------------------------------------------------------

SOURCE = pa.struct(
    {"source": pa.string(), "key": pa.string(), "num_bytes": pa.int64(), "mtime_ns": pa.int64()}
)
"""Where a file was found: name of the source, key in it, and how the file looked when hashed."""

TEXT = pa.struct(
    {
        "caption": pa.string(),
        "tags": pa.list_(pa.struct({"name": pa.string(), "category": pa.string()})),
        "rating": pa.string(),  # general | sensitive | questionable | explicit
        "repeats": pa.int32(),
        "class_name": pa.string(),
        "parent_id": pa.string(),
        "license": pa.string(),
        "split": pa.string(),
        "stamp": pa.string(),  # digest of what was read, so that an edit is noticed
    }
)
"""What was written beside an image; NULL fields were not there."""

CORE = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # hex of blake2b-128 over the file's bytes
        pa.field("image", pa.binary()),  # the original bytes; NULL when linked or rejected
        pa.field("image_uri", pa.string()),  # where a linked image lies; NULL when embedded
        pa.field("width", pa.int32()),  # upright pixels
        pa.field("height", pa.int32()),  # upright pixels
        pa.field("format", pa.string()),  # Pillow's name: JPEG, PNG, WEBP, ...
        pa.field("mode", pa.string()),  # Pillow's mode as stored
        pa.field("frames", pa.int32()),
        pa.field("exif_orientation", pa.int8()),  # 1..8; 1 when there is none
        pa.field("has_alpha", pa.bool_()),
        pa.field("num_bytes", pa.int64()),
        pa.field("warnings", pa.list_(pa.string())),
        pa.field("sources", pa.list_(SOURCE)),
        pa.field("text", TEXT),
        pa.field("ordinal", pa.int64()),  # order of arrival, from 0
        pa.field("reject_ingest", pa.string()),
    ],
    metadata={
        "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}),
        "sdprep": json.dumps({"schema_version": SCHEMA_VERSION}),
    },
)

COLUMN_PREFIX = {"scorer": "score", "tagger": "tags", "detector": "boxes", "captioner": "caption"}
"""What the struct columns of each kind of annotator are called: `<prefix>_<name>`."""

REJECT_STAGES = ("ingest", "select", "score", "duplicates", "split", "human")
"""Stages that own a nullable reason column `reject_<stage>`; a row is out if any is set."""

SCORED_TAG = pa.struct({"name": pa.string(), "p": pa.float32(), "category": pa.string()})
"""What a tagger stores: everything above its storing threshold, with its probability."""

TAG_CATEGORIES = ("general", "artist", "copyright", "character", "meta", "rating")

# --- columns that folds own ---------------------------------------------------------------------

TAG = pa.struct(
    {"name": pa.string(), "category": pa.string(), "score": pa.float32(), "source": pa.string()}
)
"""A composed tag; source: human, sidecar, joytag, wd, attributes, owlv2, alias, implication."""

CAPTION = pa.struct({"text": pa.string(), "source": pa.string()})

BOX = pa.struct(
    {
        "label": pa.string(),
        "score": pa.float32(),
        "x0": pa.float32(),  # all four are fractions of the upright original, origin top left
        "y0": pa.float32(),
        "x1": pa.float32(),
        "y1": pa.float32(),
    }
)

FOLDS = {
    "tags": pa.list_(TAG),
    "caption": pa.string(),
    "captions": pa.list_(CAPTION),
    "signature": pa.binary(16),
    "pixel_hash": pa.string(),
    "dup_id": pa.string(),
    "group_id": pa.string(),
    "split": pa.string(),
    "stable_train": pa.bool_(),
    **{f"reject_{stage}": pa.string() for stage in REJECT_STAGES if stage != "ingest"},
}
"""Columns that a fold over small columns rewrites whole, with their types."""

# --- the prepared data set ----------------------------------------------------------------------

PREPARED = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("image", pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("caption", pa.string()),
        pa.field("captions", pa.list_(CAPTION)),
        pa.field("tags", pa.list_(TAG)),
        pa.field("score", pa.int8()),  # 1..9
        pa.field("score_raw", pa.float32()),
        pa.field("signature", pa.binary()),
        pa.field("rating", pa.string()),
        pa.field("source", pa.string()),
        pa.field("license", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("boxes", pa.list_(BOX)),
        pa.field("repeats", pa.int32()),
        pa.field("stable_train", pa.bool_()),
        pa.field("validation_prompt", pa.string()),
    ]
)
SPLITS = ("train", "validation")


def read_manifest(path: str | Path) -> dict[str, Any]:
    """What `sdprep.json` says of a prepared data set: policy, certificate, fingerprints, counts.

    Args:
        path: the data set's folder, or the file itself.

    Raises:
        DataError: it is missing, damaged, or of a schema version that this release does not know.
    """
    file = Path(path) / MANIFEST if Path(path).is_dir() else Path(path)
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{file}: {error.strerror}", "A data set that sdprep publish made has this file."
        ) from None
    except ValueError as error:
        raise DataError(f"{file} is no JSON: {error}", "Publish the data set again.") from None
    version = manifest.get("SCHEMA_VERSION") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{file} has SCHEMA_VERSION {version!r}, this release reads {SCHEMA_VERSION}",
            "Publish the data set again with this release, or install the one that made it.",
        )
    return manifest
